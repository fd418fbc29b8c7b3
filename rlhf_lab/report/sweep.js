// sort the list of runs by a column, and filter it by words; without scripts the list is as the sweep has it
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const numeric = (text) => { const n = parseFloat(text.replace(/[,\u00a0]/g, "").replace("\u2212", "-")); return isNaN(n) ? null : n; };
  const key = (row, k) => row.cells[k].dataset.sort ?? row.cells[k].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [numeric(a), numeric(b)];
    return x !== null && y !== null ? x - y : x !== null ? -1 : y !== null ? 1 : a.localeCompare(b);
  };
  [...table.tHead.rows[0].cells].forEach((cell, k) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const ascending = cell.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      rows.sort((a, b) => (ascending ? 1 : -1) * compare(key(a, k), key(b, k)));
      body.append(...rows);
    });
  });
  const label = document.createElement("label"), input = document.createElement("input"), count = document.createElement("output");
  input.type = "search";
  input.placeholder = "words that a row must have, as: failed ppo_lag";
  label.className = "filter";
  label.append("Filter ", input, " ", count);
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  input.addEventListener("input", filter);
  table.closest(".scroll").before(label);
  filter();
}
