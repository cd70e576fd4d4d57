/** Elements, made without innerHTML: nothing the service or a file's name says can become markup. */

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id, which the page must have. */
export function byId(id) {
  return document.getElementById(id);
}

/** An HTML element; `on…` attributes are listeners, booleans switch, children are nodes or text, null is left out. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** An SVG element. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const SIGNS = {
  anomalous: [["path", { d: "M12 2 23 22H1Z", class: "shape" }], ["path", { d: "M12 9v6M12 17.6v2", class: "mark" }]],
  normal: [["circle", { cx: 12, cy: 12, r: 11, class: "shape" }], ["path", { d: "m6.5 12.5 4 4 7-8", class: "mark" }]],
  refused: [["rect", { x: 2, y: 2, width: 20, height: 20, rx: 3, class: "shape" }],
    ["path", { d: "m7.5 7.5 9 9m0-9-9 9", class: "mark" }]],
  waiting: [["circle", { cx: 12, cy: 12, r: 10, class: "ring" }]],
};

/** A sign that differs in shape and not in colour alone: triangle, disc, square, or a ring while waiting. */
export function sign(kind) {
  const parts = SIGNS[kind].map(([tag, attributes]) => draw(tag, attributes));
  return draw("svg", { viewBox: "0 0 24 24", class: `sign ${kind}`, "aria-hidden": "true" }, ...parts);
}
