/** The images of this visit: sent a few at a time, listed newest first, gone back to with a button. Nothing is stored. */

import * as api from "./api.js";
import { make, sign } from "./dom.js";
import { duration, number, verdictWord } from "./words.js";

const MAX_KEPT = 40;
const AT_ONCE = 4;
const THUMBNAIL = 56;

/** Sends images and keeps their list; `onchange(request)` after each step, `onselect(request)` when one is chosen. */
export class Requests {
  constructor(list, { modelFor, onchange, onselect }) {
    Object.assign(this, { list, modelFor, onchange, onselect });
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
      answer: null, problem: null, note: null, tripMs: 0, model: null, button, canvas, item: make("li", {}, button),
    };
    thumbnail(file, canvas);
    this.#label(request);
    this.all.unshift(request);
    this.list.prepend(request.item);
    return request;
  }

  #label(request) {
    const { state, answer, problem } = request;
    const kind = state === "answered" ? answer.verdict : state;
    const word = { answered: () => verdictWord(answer.verdict), refused: () => problem.title, waiting: () => "Waiting" }[state]();
    const about = state === "answered" ? `${number(answer.score)} · ${duration(request.tripMs)}` : "";
    request.button.replaceChildren(request.canvas, sign(kind), make("span", { class: "about" },
      make("strong", {}, word), make("span", { class: "name" }, request.name), make("span", {}, about)));
  }

  #forget() {
    const settled = this.all.filter((request) => request.state !== "waiting" && !request.button.hasAttribute("aria-current"));
    while (this.all.length > MAX_KEPT && settled.length) {
      const old = settled.pop();
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
    const started = performance.now();
    const onwait = (seconds) => {
      request.note = `The service is full; trying again in ${seconds} s.`;
      this.onchange(request);
    };
    try {
      const answer = await api.score(request.file, onwait);
      request.tripMs = performance.now() - started;
      request.model = await this.modelFor(answer.artifact_id);
      Object.assign(request, { state: "answered", answer });
    } catch (problem) {
      if (!(problem instanceof api.Problem)) throw problem;
      Object.assign(request, { state: "refused", problem });
    }
    this.#label(request);
    this.onchange(request);
  }
}

/** A small square picture of the file; left empty where the browser does not know the format. */
async function thumbnail(file, canvas) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return;
  }
  const scale = THUMBNAIL / Math.max(bitmap.width, bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale];
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = scale < 1;
  pen.drawImage(bitmap, (THUMBNAIL - width) / 2, (THUMBNAIL - height) / 2, width, height);
  bitmap.close();
}
