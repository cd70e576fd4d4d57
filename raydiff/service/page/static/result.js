/** One image's result: the verdict, how sure, why, and how long it took; or what is wrong with the request. */

import { make, sign } from "./dom.js";
import { histogramPicture } from "./histogram.js";
import { pictures } from "./picture.js";
import { comparison, number, percent, pValueSentence, timingSentence, verdictWord, whole } from "./words.js";

/** What is shown of a request in this state; `again` is called to send it once more. */
export function resultView(request, again) {
  if (request.state === "waiting") return waiting(request);
  const button = make("button", { type: "button", onclick: again }, "Score it again");
  return request.state === "refused" ? refused(request, button) : answered(request, button);
}

/** The calibration's histogram with the threshold, and the score where there is one; as wide as it is given room. */
export function histogramFigure(model, threshold, answer) {
  const { histogram } = model.calibration;
  const count = model.calibration.threshold.num_images;
  const place = make("div", { class: "plot" });
  const paint = (width) => place.replaceChildren(histogramPicture(width, histogram, threshold, answer));
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0) paint(width);
  }).observe(place);
  const text = `Scores of the calibration's ${whole(count)} normal images; right of the dashed line is flagged.`;
  return make("figure", { class: "scores" }, place, make("figcaption", {}, text));
}

/** The line on top: sign, word, and a sentence. */
function banner(kind, word, ...sentences) {
  return make("div", { class: `verdict ${kind}` }, sign(kind),
    make("div", {}, make("p", { class: "word" }, word), ...sentences.map((text) => make("p", {}, text))));
}

function waiting(request) {
  return make("div", {}, banner("waiting", "Scoring …", request.note ?? request.name));
}

function refused(request, button) {
  const { title, detail } = request.problem;
  return make("div", {}, banner("refused", title, detail), make("p", { class: "quiet small" }, request.name), button);
}

function answered(request, button) {
  const { answer, model } = request;
  const count = model.calibration.threshold.num_images;
  return make("div", {},
    banner(answer.verdict, verdictWord(answer.verdict), comparison(answer), pValueSentence(answer.p_value, count)),
    pictures(answer, request.url),
    histogramFigure(model, answer.threshold, answer),
    make("dl", { class: "facts" }, ...facts([
      ["Image", `${request.name}, ${answer.format.toUpperCase()}, ${answer.width} × ${answer.height}`],
      ["Time", timingSentence(answer, request.tripMs)],
      ["Threshold", `${number(answer.threshold)}, for flagging ${percent(answer.target_fpr)} of normal images`],
      ["Artefact", make("code", {}, answer.artifact_id)],
    ])),
    button);
}

/** Names and values for a dl. */
export function facts(pairs) {
  return pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}
