"use strict";
// A molecule in a canvas: balls and sticks, rotated by dragging and by the arrow keys.
// model: {positions: [[x, y, z], …] in Å around 0, elements, charges, bonds: [[i, j, order], …],
// unstable: [atom, …]}. onText(text) receives what the pointer is on and what is measured.
const elementColours = {
  H: "#e8edf1", He: "#bfeff0", Li: "#b48ae0", Be: "#a9d84e", B: "#f0aaa2", C: "#5a6570",
  N: "#3f62e0", O: "#dd3b33", F: "#5fb84a", Ne: "#9fd8e8", Na: "#9a62e0", Mg: "#6fc42e",
  Al: "#b7a2a2", Si: "#d8b48c", P: "#e0862b", S: "#d9b52c", Cl: "#2fa84f", Ar: "#74c4d8",
  K: "#8042c8", Ca: "#4fb83a", Ti: "#a6a9ad", Cr: "#7f8fc0", Mn: "#9274c0", Fe: "#d06a35",
  Co: "#dd7f92", Ni: "#58b858", Cu: "#c0793a", Zn: "#7d80ac", Ge: "#6f9090", As: "#b078d8",
  Se: "#e09a2a", Br: "#99402f", Ru: "#3a8c8c", Rh: "#2b7a88", Pd: "#2f6a82", Ag: "#a9adb3",
  Sn: "#66808a", Sb: "#9a62b2", Te: "#c8782a", I: "#7b3fa6", Pt: "#a0a0b4", Au: "#d8b23a",
  Hg: "#9a9ac0", Pb: "#565a62",
};
const otherColour = "#c05fb0";
const elementRadii = {
  H: 0.24, He: 0.28, B: 0.38, C: 0.36, N: 0.35, O: 0.34, F: 0.33, Ne: 0.33, Si: 0.46, P: 0.45,
  S: 0.44, Cl: 0.43, Ar: 0.43, Br: 0.49, I: 0.55,
}; // Å
const otherRadius = 0.5;

function multiplied(a, b) {
  return a.map((row) => [0, 1, 2].map((j) => row.reduce((sum, v, k) => sum + v * b[k][j], 0)));
}
function rotationAbout(axis, angle) {
  const c = Math.cos(angle), s = Math.sin(angle);
  return axis === "y" ? [[c, 0, s], [0, 1, 0], [-s, 0, c]] : [[1, 0, 0], [0, c, -s], [0, s, c]];
}
function parts(colour) {
  return [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
}
function mixed(colour, other, share) {
  const b = parts(other);
  const values = parts(colour).map((v, k) => Math.round(v + (b[k] - v) * share));
  return "#" + values.map((v) => v.toString(16).padStart(2, "0")).join("");
}
function difference(a, b) { return a.map((v, k) => v - b[k]); }
function cross(a, b) {
  return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
}
function dot(a, b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
function measured(points) {
  const degrees = 180 / Math.PI;
  if (points.length === 2) return `${Math.hypot(...difference(...points)).toFixed(3)} Å`;
  if (points.length === 3) {
    const a = difference(points[0], points[1]), b = difference(points[2], points[1]);
    return `${(Math.atan2(Math.hypot(...cross(a, b)), dot(a, b)) * degrees).toFixed(1)}°`;
  }
  const [a, b, c] = [1, 2, 3].map((k) => difference(points[k], points[k - 1]));
  const ab = cross(a, b), bc = cross(b, c);
  return `${(Math.atan2(Math.hypot(...b) * dot(a, bc), dot(ab, bc)) * degrees).toFixed(1)}°`;
}

class MoleculeViewer {
  constructor(canvas, model, onText) {
    this.canvas = canvas;
    this.onText = onText || (() => {});
    this.chosen = [];
    canvas.addEventListener("pointerdown", (event) => {
      this.last = [event.clientX, event.clientY];
      this.moved = 0;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.last) { this.point(event); return; }
      const step = [event.clientX - this.last[0], event.clientY - this.last[1]];
      this.moved += Math.hypot(...step);
      this.last = [event.clientX, event.clientY];
      this.rotate(step[0] / 90, step[1] / 90);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (this.last && this.moved < 5) this.choose(event);
      this.last = null;
    });
    canvas.addEventListener("pointercancel", () => { this.last = null; });
    canvas.addEventListener("pointerleave", () => { this.say(null); });
    canvas.addEventListener("dblclick", () => { this.reset(); });
    // Only of the canvas that was chosen, so that scrolling a page over it does not zoom.
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas && !event.ctrlKey && !this.focused()) return;
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 500));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const turns = {
        ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15],
      };
      if (event.key in turns) this.rotate(...turns[event.key]);
      else if (event.key === "+" || event.key === "=") this.zoom(1.15);
      else if (event.key === "-") this.zoom(1 / 1.15);
      else if (event.key === "0") this.reset();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.show(model);
  }
  focused() { return this.canvas.getRootNode().activeElement === this.canvas; }
  show(model) {
    this.model = model;
    this.unstable = new Set(model.unstable);
    this.extent = Math.max(1.2, ...model.positions.map((p) => Math.hypot(...p))) + 0.5;
    this.reset();
  }
  reset() {
    this.rotation = multiplied(rotationAbout("x", 0.25), rotationAbout("y", 0.35));
    this.reach = [1.2, 1.2]; // half the width and height of the first view, Å
    for (const p of this.model.positions) {
      const q = this.rotation.map((row) => dot(row, p));
      for (const k of [0, 1]) {
        const extent = Math.abs(q[k]) * (1 + q[2] / (6 * this.extent)) + 0.6;
        this.reach[k] = Math.max(this.reach[k], extent);
      }
    }
    this.magnification = 1;
    this.chosen = [];
    this.say(null);
    this.draw();
  }
  rotate(y, x) {
    const turn = multiplied(rotationAbout("x", x), rotationAbout("y", y));
    this.rotation = multiplied(turn, this.rotation);
    this.draw();
  }
  zoom(factor) {
    this.magnification = Math.min(12, Math.max(0.3, this.magnification * factor));
    this.draw();
  }
  name(k) {
    const charge = (this.model.charges || [])[k] || 0;
    const sign = charge > 0 ? "+" : "−";
    const text = charge ? (Math.abs(charge) > 1 ? Math.abs(charge) : "") + sign : "";
    return `${this.model.elements[k]}${k}${text && " " + text}`;
  }
  say(atom) {
    const names = this.chosen.map((k) => this.name(k)).join(" – ");
    const value = this.chosen.length > 1
      ? `: ${measured(this.chosen.map((k) => this.model.positions[k]))}` : "";
    const unstable = atom !== null && this.unstable.has(atom) ? ", unstable" : "";
    this.onText(names + value || (atom === null ? "" : this.name(atom) + unstable));
  }
  atomAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width || 1;
    const x = (event.clientX - box.left) * ratio, y = (event.clientY - box.top) * ratio;
    let found = null;
    (this.drawn || []).forEach((disc, k) => {
      const inside = Math.hypot(disc.x - x, disc.y - y) < Math.max(disc.size, 6 * ratio);
      if (inside && (found === null || disc.depth > this.drawn[found].depth)) found = k;
    });
    return found;
  }
  point(event) { this.say(this.atomAt(event)); }
  choose(event) {
    const atom = this.atomAt(event);
    if (atom === null || this.chosen.includes(atom) || this.chosen.length === 4) this.chosen = [];
    if (atom !== null) this.chosen.push(atom);
    this.say(atom);
    this.draw();
  }
  draw() {
    const box = this.canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    if (!width || !height) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    // Light text means a dark page, in every notebook and theme.
    const ink = (getComputedStyle(this.canvas).color.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
    this.dark = 0.3 * ink[0] + 0.6 * ink[1] + 0.1 * ink[2] > 128;
    this.fog = this.dark ? "#1b2128" : "#ffffff";
    const fit = Math.min(width / this.reach[0], height / this.reach[1]) / 2;
    // The first view fills the canvas, and a turned molecule stays in it but for a little.
    const scale = Math.min(fit, 1.3 * Math.min(width, height) / 2 / this.extent) * this.magnification;
    this.project = (q) => {
      const near = scale * (1 + q[2] / (6 * this.extent));
      return { x: width / 2 + q[0] * near, y: height / 2 - q[1] * near, scale: near };
    };
    this.drawn = this.model.positions.map((p, k) => {
      const q = this.rotation.map((row) => dot(row, p));
      const radius = elementRadii[this.model.elements[k]] || otherRadius;
      const colour = this.far(elementColours[this.model.elements[k]] || otherColour, q[2]);
      const disc = this.project(q);
      return { ...disc, q, radius, depth: q[2], size: radius * disc.scale, colour };
    });
    const shapes = this.drawn.map((disc, k) => ({ depth: disc.depth, atom: k }));
    for (const bond of this.model.bonds) {
      const [a, b] = [this.drawn[bond[0]], this.drawn[bond[1]]];
      shapes.push({ depth: (a.depth + b.depth) / 2 - 0.05, bond });
    }
    shapes.sort((a, b) => a.depth - b.depth);
    for (const shape of shapes) {
      if (shape.bond) this.drawBond(context, ...shape.bond);
      else this.drawAtom(context, shape.atom);
    }
  }
  far(colour, depth) {
    return mixed(colour, this.fog, 0.35 * Math.min(1, Math.max(0, 0.5 - depth / this.extent / 2)));
  }
  drawAtom(context, k) {
    const { x, y, size, scale, colour } = this.drawn[k];
    const light = context.createRadialGradient(x - size / 3, y - size / 3, size / 8, x, y, size);
    light.addColorStop(0, mixed(colour, "#ffffff", 0.55));
    light.addColorStop(1, mixed(colour, "#000000", 0.25));
    context.beginPath();
    context.arc(x, y, size, 0, 2 * Math.PI);
    context.fillStyle = light;
    context.fill();
    context.lineWidth = Math.max(1, 0.02 * scale);
    context.strokeStyle = this.dark ? "rgba(0, 0, 0, 0.7)" : "rgba(30, 40, 50, 0.55)";
    context.stroke();
    const ring = (by, colour) => {
      context.beginPath();
      context.arc(x, y, size + by * scale, 0, 2 * Math.PI);
      context.lineWidth = Math.max(2, 0.08 * scale);
      context.strokeStyle = colour;
      context.stroke();
    };
    if (this.unstable.has(k)) ring(0.04, this.dark ? "#ff6b60" : "#c62828");
    if (this.chosen.includes(k)) ring(0.14, this.dark ? "#ffd54f" : "#1565c0");
  }
  drawBond(context, i, j, order) {
    const lines = order === 12 ? 2 : order;
    const [first, second] = [this.drawn[i], this.drawn[j]];
    const along = difference(second.q, first.q), distance = Math.hypot(...along) || 1;
    const end = (disc, sign) => { // where the stick leaves the ball
      const inside = Math.min(0.9 * disc.radius, 0.45 * distance) * sign / distance;
      return this.project(disc.q.map((v, k) => v + along[k] * inside));
    };
    const [a, b] = [{ ...first, ...end(first, 1) }, { ...second, ...end(second, -1) }];
    const scale = (a.scale + b.scale) / 2;
    const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
    const across = [(a.y - b.y) / length, (b.x - a.x) / length];
    const width = Math.max(1.5, (lines === 1 ? 0.15 : lines === 2 ? 0.09 : 0.07) * scale);
    for (let k = 0; k < lines; k++) {
      const off = (k - (lines - 1) / 2) * (lines === 2 ? 0.17 : 0.14) * scale;
      const from = [a.x + across[0] * off, a.y + across[1] * off];
      const to = [b.x + across[0] * off, b.y + across[1] * off];
      const middle = [(from[0] + to[0]) / 2, (from[1] + to[1]) / 2];
      context.setLineDash(order === 12 && k ? [0.14 * scale, 0.1 * scale] : []);
      for (const [start, end, atom] of [[from, middle, a], [middle, to, b]]) {
        for (const [by, colour] of [[1.5, "#000000"], [0, null]]) {
          context.beginPath();
          context.moveTo(...start);
          context.lineTo(...end);
          context.lineWidth = width + by;
          context.strokeStyle = colour ? mixed(atom.colour, colour, 0.5)
            : mixed(atom.colour, "#000000", 0.06);
          context.stroke();
        }
      }
    }
    context.setLineDash([]);
  }
}
