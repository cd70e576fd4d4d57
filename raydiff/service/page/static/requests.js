/** The images of this visit: sent a few at a time, listed newest first, gone back to with a button; never stored. */

import * as api from "./api.js";
import { make, sign } from "./dom.js";
import { duration, number, verdictWord } from "./words.js";

const MAX_KEPT = 40;
const AT_ONCE = 4;
const THUMBNAIL = 56;

/**
 * Sends images of at most `maxBytes()` and keeps their list. `modelFor(id)` has the model that answered;
 * `onchange(request)` is called after each step, `onselect(request)` when one is chosen.
 */
export class Requests {
  constructor(list, { modelFor, maxBytes, onchange, onselect }) {
    Object.assign(this, { list, modelFor, maxBytes, onchange, onselect });
    this.all = [];
    this.queue = [];
    this.running = 0;
  }

  /** Line up images; the request of the first. */
  add(files) {
    const made = [...files].reverse().map((file) => this.#make(file)).reverse(); // the first on top
    this.queue.push(...made);
    this.#forget();
    this.#next();
    return made[0];
  }

  /** Send one once more; it keeps its place in the list. */
  again(request) {
    if (request.state === "waiting") return;
    Object.assign(request, { state: "waiting", problem: null, note: null });
    this.queue.push(request);
    this.#label(request);
    this.onchange(request);
    this.#next();
  }

  /** Mark the one that is shown. */
  select(request) {
    for (const other of this.all) other.button.removeAttribute("aria-current");
    request.button.setAttribute("aria-current", "true");
    this.onselect(request);
  }

  get numWaiting() {
    return this.all.filter((request) => request.state === "waiting").length;
  }

  get trips() {
    return this.all.filter((request) => request.state === "answered").map((request) => request.tripMs);
  }

  #make(file) {
    const button = make("button", { type: "button", onclick: () => this.select(request) });
    const canvas = make("canvas", { width: THUMBNAIL, height: THUMBNAIL, "aria-hidden": "true" });
    const request = {
      file, name: file.name || "pasted image", url: URL.createObjectURL(file), state: "waiting",
      answer: null, problem: null, note: null, tripMs: 0, model: null, painted: null, button, canvas,
      item: make("li", {}, button),
    };
    this.#label(request);
    this.all.unshift(request);
    this.list.prepend(request.item);
    return request;
  }

  #label(request) {
    const { state, answer, problem } = request;
    const kind = state === "answered" ? answer.verdict : state;
    const word = state === "answered" ? verdictWord(answer.verdict) : problem?.title ?? "Waiting";
    const about = state === "answered" ? `${number(answer.score)} · ${duration(request.tripMs)}` : "";
    request.button.replaceChildren(request.canvas, sign(kind), make("span", { class: "about" },
      make("strong", {}, word), make("span", { class: "name" }, request.name), make("span", {}, about)));
  }

  #forget() {
    const done = this.all.filter(({ state, button }) => state !== "waiting" && !button.hasAttribute("aria-current"));
    while (this.all.length > MAX_KEPT && done.length) {
      const old = done.pop();
      this.all.splice(this.all.indexOf(old), 1);
      old.item.remove();
      URL.revokeObjectURL(old.url);
    }
  }

  #next() {
    while (this.running < AT_ONCE && this.queue.length) {
      this.running += 1;
      this.#send(this.queue.shift()).finally(() => {
        this.running -= 1;
        this.#next();
      });
    }
  }

  async #send(request) {
    request.painted ??= paintFile(request.canvas, request.file); // here, so that few files are decoded at once
    const started = performance.now();
    const onwait = (seconds) => {
      request.note = `The service is full; trying again in ${seconds} s.`;
      this.onchange(request);
    };
    try {
      const answer = await api.score(request.file, this.maxBytes(), onwait);
      request.tripMs = performance.now() - started;
      request.model = await this.modelFor(answer.artifact_id);
      Object.assign(request, { state: "answered", answer });
      request.painted.then((done) => done || paintHeatMap(request.canvas, answer));
    } catch (problem) {
      if (!(problem instanceof api.Problem)) throw problem;
      Object.assign(request, { state: "refused", problem });
    }
    this.#label(request);
    this.#forget();
    this.onchange(request);
  }
}

/** A small square picture of something `width` by `height`. */
function paint(canvas, picture, width, height) {
  const scale = THUMBNAIL / Math.max(width, height);
  const [across, down] = [width * scale, height * scale];
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = scale < 1;
  pen.drawImage(picture, (THUMBNAIL - across) / 2, (THUMBNAIL - down) / 2, across, down);
}

/** False where the browser does not know the format. */
async function paintFile(canvas, file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return false;
  }
  paint(canvas, bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  return true;
}

/** The service's picture instead. */
async function paintHeatMap(canvas, { explanation, width, height }) {
  if (explanation.pictures.heat_map === null) return;
  const picture = new Image();
  picture.src = `data:image/png;base64,${explanation.pictures.heat_map}`;
  await picture.decode();
  paint(canvas, picture, width, height);
}
