"use strict";
// Tables that sort and figures that enlarge. The page holds everything without them; nothing is loaded, nothing stored.
{
  // A number as the page writes it, with or without what counts examples before it: "−0.750 [...]", "smoke: n = 28".
  const NUMBER = /^(?:[a-z: ]*n = )?([+−-]?[\d,]*\.?\d+(?:e[+−-]?\d+)?)(?: (GiB))?/;
  const NOTHING = "–";

  const textOf = (row, column) => row.cells[column].textContent.trim();

  const numberOf = (text) => {
    const found = NUMBER.exec(text);
    return found ? Number(found[1].replaceAll("−", "-").replaceAll(",", "")) * (found[2] ? 1024 : 1) : NaN;
  };

  // Rows by the column: numbers where all cells are, else words; cells without a value stay last either way.
  const sorted = (groups, column, direction) => {
    const present = ([row]) => ![NOTHING, ""].includes(textOf(row, column));
    const filled = groups.filter(present);
    const numeric = filled.every(([row]) => !Number.isNaN(numberOf(textOf(row, column))));
    const compare = numeric
      ? (one, other) => numberOf(one) - numberOf(other)
      : (one, other) => one.localeCompare(other, "en", { numeric: true });
    filled.sort(([one], [other]) => direction * compare(textOf(one, column), textOf(other, column)));
    return [...filled, ...groups.filter((group) => !present(group))];
  };

  const makeSortable = (table) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    // A row of one wide cell is a remark on the row before it and stays with it.
    const groups = [];
    for (const row of body.rows) {
      if (row.cells.length === 1 && groups.length) groups.at(-1).push(row);
      else groups.push([row]);
    }
    if (groups.length < 2) return;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: null }[head.ariaSort];
        const order = next === undefined ? "ascending" : next;
        for (const other of heads) other.removeAttribute("aria-sort");
        if (order) head.setAttribute("aria-sort", order);
        const rows = order ? sorted(groups, column, order === "ascending" ? 1 : -1) : groups;
        body.append(...rows.flat());
      });
    });
  };

  const makeEnlargeable = (image, dialog) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "enlarge";
    button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      dialog.setAttribute("aria-label", image.alt);
      dialog.querySelector(".scroll").replaceChildren(image.cloneNode());
      dialog.showModal();
    });
  };

  const dialog = document.createElement("dialog");
  dialog.className = "large";
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  const inside = document.createElement("div");
  inside.className = "scroll";
  dialog.append(close, inside);
  document.body.append(dialog);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // on what lies behind it
  });

  for (const table of document.querySelectorAll("table")) if (table.tHead) makeSortable(table);
  for (const image of document.querySelectorAll("figure img")) makeEnlargeable(image, dialog);
}
