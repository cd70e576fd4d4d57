/** The live model, its target rate, and drift. */

import * as api from "./api.js";
import { byId, make, sign } from "./dom.js";
import { facts } from "./result.js";
import { driftSentence, driftSign, number, percent, whole } from "./words.js";

const FITTED = {
  stretch: "other images are stretched to that",
  pad: "other images are scaled, and padded at their edges",
  own: "smaller images are padded at their edges, larger ones scaled",
  strict: "other images are refused",
};

/** Facts of the model, and the rate in force in its field unless somebody is typing there. */
export function showModel(model) {
  const { calibration, image } = model;
  byId("lead").textContent = `${model.detector} says how far an image is from the normal ones it learnt from.`;
  byId("facts").replaceChildren(...facts([
    ["Detector", model.detector + (model.pretrained ? ` on ${model.pretrained}` : "")],
    ["Artefact", make("code", {}, model.artifact_id)],
    ["Training data", trainingData(model)],
    ["Takes", `${image.width} × ${image.height}, ${image.channels === 1 ? "grey" : "RGB"}; ${
      image.aligned_width ? "the part is turned level and centred" : FITTED[image.resize]}`],
    ["Threshold", `${number(calibration.threshold.value)}: ${calibration.rule}`],
    ...measured(model.metrics),
    ...(model.num_replicas === undefined ? [] : [["Replicas", `${model.num_replicas}`]]),
  ]));
  const field = byId("rate");
  if (document.activeElement !== field) field.value = shown(calibration.threshold.target_fpr);
  byId("rate-own").textContent = `Default (${percent(calibration.own_target_fpr)})`;
}

/** Ask for drift and say it; what goes wrong is said in its place. */
export async function refreshDrift() {
  const place = byId("drift-sentence");
  try {
    const drift = await api.drift();
    const kind = driftSign(drift);
    place.replaceChildren(...(kind === "waiting" ? [] : [sign(kind)]), driftSentence(drift));
  } catch (problem) {
    place.textContent = `Not known: ${problem.detail}`;
  }
}

/** The field of the target rate; `changed()` after the service took another. */
export function watchRate(changed) {
  const said = byId("rate-said");
  const set = async (share) => {
    try {
      const threshold = await api.setRate(share);
      said.textContent = `The threshold is now ${number(threshold.value)}, from the next image on.`;
      byId("rate").value = shown(threshold.target_fpr);
      await changed();
    } catch (problem) {
      said.textContent = `Not changed: ${problem.detail}`;
    }
  };
  byId("rate-form").addEventListener("submit", (event) => {
    event.preventDefault();
    set(Number(byId("rate").value) / 100);
  });
  byId("rate-own").addEventListener("click", () => set(null));
}

/** The field of the API key; `changed()` after another is in use. */
export function watchKey(changed) {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.useKey(byId("key").value);
    byId("key-said").textContent = "In use until this page is closed, and stored nowhere.";
    changed();
  });
}

const shown = (share) => Number((100 * share).toPrecision(6));

function trainingData({ config, provenance, training_data_digest: digest }) {
  const classes = provenance.normal_classes ?? [];
  const count = provenance.num_train_images;
  const about = [config.data.dataset.name];
  if (classes.length) about.push(`normal: ${classes.join(", ")}`);
  if (count) about.push(`${whole(count)} images`);
  return make("span", {}, about.join("; "), digest === null ? null : "; digest ",
    digest === null ? null : make("code", {}, digest.slice(0, 16)));
}

function measured(row) {
  const auroc = row?.metrics?.auroc;
  if (!auroc) return [];
  const images = `${whole(row.num_normal)} normal and ${whole(row.num_anomalous)} anomalous test images`;
  const interval = auroc.low === null ? "" : ` (${number(auroc.low)} to ${number(auroc.high)})`;
  return [["Measured", `AUROC ${number(auroc.value)}${interval} on ${images}`]];
}
