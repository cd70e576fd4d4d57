/** The score against the threshold, on the scores of the calibration's normal images. */

import { draw } from "./dom.js";
import { number, whole } from "./words.js";

const HEIGHT = 176;
const TOP = 44;
const BOTTOM = 34;
const SIDE = 14;

/**
 * A picture `width` pixels wide.
 *
 * @param histogram {edges, counts} of the calibration scores
 * @param threshold the cut
 * @param answer what to mark: {score, verdict}; null for none
 */
export function histogramPicture(width, histogram, threshold, answer) {
  const domain = domainOf(histogram.edges, threshold, answer);
  const x = (value) => SIDE + ((value - domain[0]) / (domain[1] - domain[0])) * (width - 2 * SIDE);
  const floor = HEIGHT - BOTTOM;
  const parts = [
    draw("rect", { x: x(threshold), y: TOP, width: width - x(threshold), height: floor - TOP, class: "beyond" }),
    ...bars(histogram, x, floor),
    ...axis(domain, x, floor, width),
    draw("line", { x1: x(threshold), x2: x(threshold), y1: 18, y2: floor, class: "threshold" }),
    label(x(threshold), 13, width, `threshold ${number(threshold)}`, "threshold-text"),
  ];
  if (answer !== null) parts.push(...mark(answer, domain, x, floor, width));
  const named = { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img" };
  return draw("svg", { ...named, "aria-label": inWords(histogram, threshold, answer), class: "histogram" }, ...parts);
}

/** Scores far beyond the calibration's would press it flat: the axis ends one range above the rest. */
function domainOf(edges, threshold, answer) {
  let low = Math.min(edges[0], threshold);
  let high = Math.max(edges.at(-1), threshold);
  const range = high - low || Math.abs(high) || 1;
  if (answer !== null) {
    low = Math.max(Math.min(low, answer.score), low - range);
    high = Math.min(Math.max(high, answer.score), high + range);
  }
  const margin = 0.04 * range;
  return [low - margin, high + margin];
}

function bars({ edges, counts }, x, floor) {
  const tallest = Math.max(...counts, 1);
  return counts.map((count, i) => {
    const height = (count / tallest) * (floor - TOP - 4);
    const width = Math.max(x(edges[i + 1]) - x(edges[i]) - 0.8, 0.8);
    return draw("rect", { x: x(edges[i]), y: floor - height, width, height, class: "bar" });
  });
}

function axis(domain, x, floor, width) {
  const step = niceStep((domain[1] - domain[0]) / Math.max(width / 90, 2));
  const parts = [draw("line", { x1: 0, x2: width, y1: floor, y2: floor, class: "axis" })];
  for (let i = Math.ceil(domain[0] / step); i * step <= domain[1]; i += 1) {
    const at = x(i * step);
    parts.push(draw("line", { x1: at, x2: at, y1: floor, y2: floor + 4, class: "axis" }));
    parts.push(draw("text", { x: at, y: floor + 17, "text-anchor": "middle" }, number(i * step)));
  }
  return parts;
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least);
}

/** A disc for normal, a triangle for anomalous, an arrow where the score is off the axis. */
function mark(answer, domain, x, floor, width) {
  const at = x(Math.min(Math.max(answer.score, domain[0]), domain[1]));
  const off = answer.score > domain[1] ? " →" : answer.score < domain[0] ? " ←" : "";
  const kind = answer.verdict;
  const shape = kind === "anomalous"
    ? draw("path", { d: `M${at} ${floor - 15}l9 16h-18Z`, class: `point ${kind}` })
    : draw("circle", { cx: at, cy: floor - 6, r: 7, class: `point ${kind}` });
  return [
    draw("line", { x1: at, x2: at, y1: 34, y2: floor, class: `score ${kind}` }),
    shape,
    label(at, 30, width, `this image ${number(answer.score)}${off}`, "score-text"),
  ];
}

function label(at, y, width, text, kind) {
  const right = at > width / 2;
  return draw("text", { x: right ? at + 4 : at - 4, y, "text-anchor": right ? "end" : "start", class: kind }, text);
}

function inWords(histogram, threshold, answer) {
  const count = histogram.counts.reduce((sum, value) => sum + value, 0);
  const [low, high] = [number(histogram.edges[0]), number(histogram.edges.at(-1))];
  const cut = `the threshold is ${number(threshold)}`;
  const spread = `Scores of ${whole(count)} normal images, from ${low} to ${high}; ${cut}`;
  return answer === null ? `${spread}.` : `${spread} and this image's score ${number(answer.score)}.`;
}
