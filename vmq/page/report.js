"use strict";
// Sorting and filtering of the tables; everything is readable without it.
// Tab brings what it reaches into view, but leaves it where a part of it shows: bring all of it.
document.addEventListener("focusin", ({ target }) =>
  target.closest("th, nav a")?.scrollIntoView({ block: "nearest", inline: "nearest" }));
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ||
        (!head.hasAttribute("aria-sort") && head.dataset.first === "down");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const text = row.cells[column].dataset.v;
        return text === undefined || text === "" ? null : text;
      };
      const numbers = head.classList.contains("n");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);   // what has no value stands last
        const order = numbers ? x - y : x.localeCompare(y, "en", { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
const form = document.getElementById("filters");
if (form) {
  const rows = [...document.querySelectorAll("#tensor-table tbody tr")];
  const shown = document.getElementById("shown");
  const apply = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = form.elements.kind.value;
    const closure = form.elements.closure.value;
    let count = 0;
    for (const row of rows) {
      const fits = words.every((w) => row.dataset.text.includes(w)) &&
        (!kind || row.dataset.kind === kind) && (!closure || row.dataset.closure === closure);
      row.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${rows.length} shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
