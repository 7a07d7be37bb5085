// Cards of molecules, a page at a time, in the place of the static drawings of `root`.
// Text of files only ever becomes text, never HTML.
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

class MoleculeCard {
  constructor() {
    this.card = element("div", "mm-card");
    const view = element("div", "mm-view");
    this.canvas = element("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.info = element("div", "mm-info");
    this.problem = element("div", "mm-problem");
    this.caption = element("div", "mm-caption");
    view.append(this.canvas, this.info, this.problem);
    this.card.append(view, this.caption);
  }
  show(molecule) {
    this.card.hidden = !molecule;
    if (!molecule) return;
    this.problem.hidden = !molecule.problem;
    this.problem.textContent = molecule.problem;
    this.canvas.style.visibility = molecule.problem ? "hidden" : "";
    const title = [molecule.title, molecule.formula].filter(Boolean).join(", ");
    this.canvas.setAttribute("aria-label", `${title}, in three dimensions`);
    this.caption.replaceChildren(element("strong", "", molecule.title));
    if (molecule.formula) this.caption.append(` · ${molecule.formula}`);
    if (molecule.smiles) this.caption.append(element("div", "mm-smiles", molecule.smiles));
    for (const text of molecule.good) this.caption.append(element("div", "mm-good", text));
    for (const text of molecule.bad) this.caption.append(element("div", "mm-bad", text));
    if (molecule.properties.length) {
      this.caption.append(element("div", "mm-quiet", molecule.properties.join(" · ")));
    }
    if (this.viewer) this.viewer.show(molecule);
    else {
      this.viewer = new MoleculeViewer(this.canvas, molecule, (text) => { this.info.textContent = text; });
    }
  }
}

function showMolecules(root, molecules, perPage) {
  root.dataset.started = "true";
  const grid = element("div", "mm-grid");
  const cards = molecules.slice(0, perPage).map(() => new MoleculeCard());
  grid.append(...cards.map((card) => card.card));
  let first = 0;
  const range = element("span");
  const previous = element("button", "", "‹ previous"), next = element("button", "", "next ›");
  function turn(to) {
    first = to;
    cards.forEach((card, k) => card.show(molecules[first + k]));
    const last = Math.min(first + perPage, molecules.length);
    range.textContent = `${first + 1}–${last} of ${molecules.length}`;
    previous.disabled = first === 0;
    next.disabled = last === molecules.length;
  }
  previous.addEventListener("click", () => turn(first - perPage));
  next.addEventListener("click", () => turn(first + perPage));
  const head = root.querySelector(".mm-head");
  if (head && molecules.length > perPage) {
    const pages = element("span", "mm-pages");
    pages.append(previous, range, next);
    head.append(pages);
  }
  root.querySelector(".mm-static").replaceWith(grid);
  const help = "Drag to rotate, double-click to reset; click a molecule, then scroll to zoom. " +
    "Click two, three or four atoms for their distance, angle or dihedral.";
  grid.after(element("div", "mm-quiet mm-help", help));
  turn(0);
  const redraw = () => cards.forEach((card) => { if (card.viewer) card.viewer.draw(); });
  new ResizeObserver(redraw).observe(grid);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  grid.addEventListener("pointerenter", redraw); // after a change of the notebook's theme
}
