/** The image with the heat map and the regions over it, and what the detector rebuilt, side by side. */

import { byId, draw, make } from "./dom.js";
import { number, percent } from "./words.js";

const settings = { opacity: 80, boxes: true }; // stay as they are from image to image

/** Pictures of one answer with what governs them; `url` is the original's, in the browser's memory. */
export function pictures(answer, url) {
  const explained = answer.explanation;
  const shots = explained.pictures;
  const layer = shots.heat_layer === null ? null : make("img", { class: "layer", src: png(shots.heat_layer), alt: "" });
  const boxes = boxesPicture(answer);
  const image = make("img", { class: "base", src: url, alt: "The image as it was sent" });
  const caption = make("figcaption", {}, layer === null ? "The image." : "The image under its heat map.");
  const stage = make("div", { class: "stage" }, image, layer, boxes);
  image.addEventListener("error", () => cannotShow(image, layer, shots, caption), { once: true });
  shape(stage, answer);
  const parts = [make("figure", {}, stage, caption)];
  if (shots.reconstruction !== null) parts.push(reconstruction(answer));
  const unmapped = () => make("p", { class: "quiet" }, "This detector has no heat map.");
  return make("div", { class: "explained" },
    make("div", { class: "pictures" }, ...parts),
    layer === null ? unmapped() : controls(layer, boxes, explained),
    regions(explained));
}

function png(base64) {
  return `data:image/png;base64,${base64}`;
}

/** The frame has the upright original's proportions; few pixels are shown as the squares they are. */
function shape(frame, answer) {
  frame.style.aspectRatio = `${answer.width} / ${answer.height}`;
  frame.style.maxWidth = `calc(55vh * ${answer.width / answer.height})`;
  frame.classList.toggle("coarse", Math.max(answer.width, answer.height) <= 256);
}

function reconstruction(answer) {
  const rebuilt = png(answer.explanation.pictures.reconstruction);
  const image = make("img", { class: "base", src: rebuilt, alt: "The reconstruction" });
  const frame = make("div", { class: "stage" }, image);
  shape(frame, answer);
  return make("figure", {}, frame, make("figcaption", {}, "The reconstruction: how the detector would expect it."));
}

/** Browsers show no TIFF, say: then the service's own picture, whose heat map cannot be taken off. */
function cannotShow(image, layer, shots, caption) {
  if (shots.heat_map === null) {
    caption.textContent = "This browser cannot show this format.";
    return;
  }
  image.src = png(shots.heat_map);
  layer.hidden = true;
  byId("opacity").disabled = true;
  caption.textContent = "The image in grey under its heat map; this browser cannot show this format.";
}

function boxesPicture(answer) {
  const parts = answer.explanation.boxes.flatMap(({ x, y, width, height }) => [
    draw("rect", { x, y, width, height, class: "box under" }),
    draw("rect", { x, y, width, height, class: "box" }),
  ]);
  const view = { viewBox: `0 0 ${answer.width} ${answer.height}`, preserveAspectRatio: "none", class: "boxes" };
  const picture = draw("svg", { ...view, "aria-hidden": "true" }, ...parts);
  picture.toggleAttribute("hidden", !settings.boxes);
  return picture;
}

function controls(layer, boxes, explained) {
  const said = make("output", { for: "opacity" });
  const range = { type: "range", min: "0", max: "100", step: "5", value: settings.opacity };
  const slider = make("input", { id: "opacity", ...range });
  const follow = () => {
    settings.opacity = Number(slider.value);
    layer.style.opacity = settings.opacity / 100;
    said.value = percent(settings.opacity / 100);
  };
  slider.addEventListener("input", follow);
  follow();
  const ticked = () => {
    settings.boxes = tick.checked;
    boxes.toggleAttribute("hidden", !tick.checked);
  };
  const tick = make("input", { id: "show-boxes", type: "checkbox", checked: settings.boxes, onchange: ticked });
  return make("div", { class: "controls" },
    make("div", { class: "slider" }, make("label", { for: "opacity" }, "Heat map"), slider, said),
    legend(explained.heat_scale),
    explained.boxes.length ? make("label", { class: "tick" }, tick, "Show the regions") : null);
}

function legend(scale) {
  if (scale === null) return null;
  return make("div", { class: "legend" },
    make("span", { class: "ramp", "aria-hidden": "true" }),
    make("span", {}, number(scale.low)),
    make("span", {}, `${number(scale.middle)}: few normal images reach it`),
    make("span", {}, `${number(scale.high)}+`));
}

function regions({ boxes, num_regions: count }) {
  if (!boxes.length) return null;
  const rows = boxes.map((box, i) => make("tr", {},
    make("th", { scope: "row" }, `${i + 1}`),
    make("td", {}, `${box.x}, ${box.y}`),
    make("td", {}, `${box.width} × ${box.height}`),
    make("td", {}, number(box.peak))));
  const head = ["", "x, y", "pixels", "peak"].map((word) => make("th", { scope: "col" }, word));
  const words = count === 1 ? "One anomalous region" : `${count} anomalous regions`;
  const part = count > boxes.length ? `, the ${boxes.length} highest` : "";
  return make("details", { class: "regions" }, make("summary", {}, words + part),
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}
