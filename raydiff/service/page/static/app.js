/** The page at /: ties the parts together. Everything lives in memory and ends with the page. */

import * as api from "./api.js";
import { byId, make } from "./dom.js";
import { watchIntake } from "./intake.js";
import { refreshDrift, showModel, watchKey, watchRate } from "./panel.js";
import { Requests } from "./requests.js";
import { histogramFigure, resultView } from "./result.js";
import { comparison, latencySentence, verdictWord } from "./words.js";

const DRIFT_AFTER_MS = 1200; // replicas report once a second
const LOOK_EVERY_MS = 10_000;
const LOOK_FOR_MS = 120_000; // after the last image: a page left open must not keep replicas awake

let model = null;
let selected = null;
let answeredAt = -Infinity;
let soon = 0;

const maxBytes = () => model?.limits.max_bytes ?? Infinity;
const requests = new Requests(byId("list"), { modelFor, maxBytes, onchange, onselect: show });

/** The model that answered: another artefact may have gone live meanwhile. */
async function modelFor(artifactId) {
  if (model?.artifact_id !== artifactId) await refreshModel();
  return model;
}

async function refreshModel() {
  model = await api.model();
  showModel(model);
  complain(null);
  if (selected === null) byId("shown").replaceChildren(histogramFigure(model, model.calibration.threshold.value, null));
}

/** A problem that belongs to no image; null when there is none any more. */
function complain(title, detail) {
  const place = byId("trouble");
  place.hidden = title === null;
  place.replaceChildren(...(title === null ? [] : [make("strong", {}, title), make("p", {}, detail)]));
}

function take(files) {
  complain(null);
  byId("recent").hidden = false;
  requests.select(requests.add(files));
  sayBusy();
}

function show(request) {
  selected = request;
  const wasInside = byId("shown").contains(document.activeElement);
  byId("shown").replaceChildren(resultView(request, () => requests.again(request)));
  if (wasInside) byId("result").focus({ preventScroll: true }); // what had the focus is gone
}

function onchange(request) {
  if (request === selected) show(request);
  sayBusy();
  if (request.state === "waiting") return;
  const { answer, problem, name } = request;
  const finding = problem ? [problem.title, problem.detail] : [verdictWord(answer.verdict), comparison(answer)];
  byId("said").textContent = `${name}: ${finding.join(". ")}`;
  if (requests.trips.length) byId("latency").textContent = latencySentence(requests.trips);
  if (problem?.status === 401) byId("key").focus();
  answeredAt = performance.now();
  clearTimeout(soon);
  soon = setTimeout(refreshDrift, DRIFT_AFTER_MS);
}

/** What may change without the page: drift, the artefact, the number of replicas. */
function look() {
  if (document.visibilityState !== "visible" || performance.now() - answeredAt > LOOK_FOR_MS) return;
  refreshDrift();
  refreshModel().catch((problem) => complain(problem.title, problem.detail));
}

function sayBusy() {
  const waiting = requests.numWaiting;
  byId("busy").hidden = waiting === 0;
  byId("busy").textContent = waiting ? `${waiting} ${waiting === 1 ? "image is" : "images are"} being scored.` : "";
}

async function begin() {
  try {
    await refreshModel();
    await refreshDrift();
  } catch (problem) {
    byId("lead").textContent = "The model is not known yet.";
    complain(problem.title, problem.detail);
  }
}

watchIntake(take, complain);
watchRate(refreshModel);
watchKey(begin);
setInterval(look, LOOK_EVERY_MS);
begin();
