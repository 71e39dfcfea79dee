const filters = [...document.querySelectorAll("select[data-filter]")];
function applyFilters() {
  let shown = 0;
  for (const sample of document.querySelectorAll(".answer")) {
    const fits = (f) => !f.value || JSON.parse(sample.dataset[f.dataset.filter]).includes(f.value);
    sample.hidden = !filters.every(fits);
    shown += !sample.hidden;
  }
  document.getElementById("shown").textContent = shown;
}
filters.forEach((f) => f.addEventListener("change", applyFilters));
document.querySelectorAll("a[data-choose]").forEach((link) => link.addEventListener("click", () => {
  document.querySelector('select[data-filter="task"]').value = link.dataset.choose;
  applyFilters();
}));
applyFilters();
