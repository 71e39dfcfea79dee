const answers = [...document.querySelectorAll(".answer")];
const filters = [...document.querySelectorAll("select[data-filter]")];
const search = document.getElementById("search");
const texts = answers.map((answer) => answer.textContent.toLowerCase());
const more = document.getElementById("more");
const step = 20;  // a page with all of them is a hundred screens long
let limit = step;
function show() {
  const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (answer, place) =>
    filters.every((f) => !f.value || JSON.parse(answer.dataset[f.dataset.filter]).includes(f.value)) &&
    wanted.every((word) => texts[place].includes(word));
  const fitting = answers.filter(fits);
  const shown = new Set(fitting.slice(0, limit));
  answers.forEach((answer) => { answer.hidden = !shown.has(answer); });
  document.getElementById("shown").textContent = shown.size;
  more.hidden = shown.size === fitting.length;
  more.textContent = `show ${Math.min(step, fitting.length - shown.size)} more of ${fitting.length}`;
}
function applyFilters() {
  limit = step;
  show();
}
function showMore() {
  limit += step;
  show();
}
function clearFilters() {
  [search, ...filters].forEach((field) => { field.value = ""; });
  applyFilters();
}
function move(by) {
  const shown = () => answers.filter((answer) => !answer.hidden);
  const place = shown().indexOf(document.activeElement.closest(".answer"));
  const wanted = place < 0 ? 0 : Math.max(place + by, 0);
  if (wanted === shown().length) showMore();
  const next = shown()[wanted];
  if (next) { next.focus(); next.scrollIntoView({ block: "start" }); }
}
const keys = { j: () => move(1), k: () => move(-1), "/": () => search.focus() };
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { clearFilters(); document.activeElement.blur(); }
  const isTyping = event.target.matches("input, select, textarea");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
filters.forEach((f) => f.addEventListener("change", applyFilters));
search.addEventListener("input", applyFilters);
more.addEventListener("click", showMore);
document.getElementById("clear").addEventListener("click", clearFilters);
document.querySelectorAll("a[data-choose]").forEach((link) => link.addEventListener("click", () => {
  document.querySelector('select[data-filter="task"]').value = link.dataset.choose;
  applyFilters();
}));
document.querySelector(".filters").hidden = false;
applyFilters();
