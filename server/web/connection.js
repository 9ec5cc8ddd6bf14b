// Whether the server is there, and what it says of itself: asked again and again while the page is seen.

import * as api from "./api.js";
import { Reading } from "./reading.js";

const BUSY_MS = 1000;
const IDLE_MS = 5000;
const RETRY_MS = 2000;

/**
 * The server as last seen. `phase` is "connecting", "loading" (the model), "ready", "locked" (it wants another key),
 * "failing" (its last step failed), "dead" (its engine has ended) or "lost" (nothing answers); `problem` is what it
 * said. `models` are those served, `now` and `before` two readings of its metrics about a second apart.
 */
export class Connection {
  phase = "connecting";
  problem = "";
  models = [];
  now = null;
  before = null;
  #readings = []; // the last ones, oldest first
  #key;
  #listeners = [];
  #isBusy = false;
  #isDue = false; // also while a look is under way, which may be from before
  #wake = () => {};

  /** `key()` is the API key to use. */
  constructor(key) {
    this.#key = key;
  }

  /** Call `listener()` after every look. */
  onLook(listener) {
    this.#listeners.push(listener);
  }

  /** True where answers can be asked for. A failing server may have recovered; trying is how to find out. */
  get isOpen() {
    return this.phase === "ready" || this.phase === "failing";
  }

  /** Look at once: something happened. */
  look() {
    this.#isDue = true;
    this.#wake();
  }

  /** Tell that an answer begins or ends. While one grows, the server is looked at each second. */
  setBusy(isBusy) {
    this.#isBusy = isBusy;
    if (isBusy) this.#readings = []; // what is shown of an answer is about nothing before it
    this.look();
  }

  /** Look for as long as the page is there. */
  async watch() {
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
    for (;;) {
      this.#isDue = false;
      if (!document.hidden) {
        await this.#look();
        for (const listener of this.#listeners) listener();
      }
      if (this.#isDue) continue;
      await new Promise((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, this.isOpen ? (this.#isBusy ? BUSY_MS : IDLE_MS) : RETRY_MS);
      });
    }
  }

  async #look() {
    const key = this.#key();
    try {
      if (!this.isOpen) this.models = await api.models(key);
      const [health] = await Promise.all([api.health(), this.#measure(key)]);
      this.phase = { ok: "ready", failing: "failing" }[health] ?? "dead";
      this.problem = "";
    } catch (error) {
      this.phase = { 0: "lost", 401: "locked", 503: "loading" }[error.status] ?? "failing";
      this.problem = error.message;
      this.now = null;
      this.#readings = [];
    }
  }

  async #measure(key) {
    const askedAt = performance.now();
    try {
      const page = await api.metrics(key);
      this.#take(new Reading(page, performance.now(), askedAt));
    } catch (error) {
      if (error.status === 0 || error.status === 401) throw error;
      this.now = null; // a proxy keeps them to itself
    }
  }

  #take(reading) {
    const old = this.#readings.findLast((each) => reading.readAt - each.readAt > BUSY_MS * 0.9);
    this.before = old ?? this.#readings[0] ?? reading;
    this.now = reading;
    this.#readings = [...this.#readings.slice(-2), reading];
  }
}
