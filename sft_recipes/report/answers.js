const answers = [...document.querySelectorAll(".answer")];
const filters = [...document.querySelectorAll("select[data-filter]")];
const search = document.getElementById("search");
const texts = answers.map((answer) => answer.textContent.toLowerCase());
function applyFilters() {
  const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (answer, text) =>
    filters.every((f) => !f.value || JSON.parse(answer.dataset[f.dataset.filter]).includes(f.value)) &&
    wanted.every((word) => text.includes(word));
  answers.forEach((answer, place) => { answer.hidden = !fits(answer, texts[place]); });
  document.getElementById("shown").textContent = answers.filter((answer) => !answer.hidden).length;
}
function clearFilters() {
  [search, ...filters].forEach((field) => { field.value = ""; });
  applyFilters();
}
function move(step) {
  const shown = answers.filter((answer) => !answer.hidden);
  const place = shown.indexOf(document.activeElement.closest(".answer"));
  const next = shown[place < 0 ? 0 : Math.min(Math.max(place + step, 0), shown.length - 1)];
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
document.getElementById("clear").addEventListener("click", clearFilters);
document.querySelectorAll("a[data-choose]").forEach((link) => link.addEventListener("click", () => {
  document.querySelector('select[data-filter="task"]').value = link.dataset.choose;
  applyFilters();
}));
document.querySelector(".filters").hidden = false;
applyFilters();
