// An answer on the page, growing or complete.

import { actionRow, button, editInPlace } from "./actions.js";
import { paceOf } from "./chat.js";
import { isUnanswered } from "./conversation.js";
import { element } from "./dom.js";
import { render } from "./markdown.js";

const SILENT_MS = 1000; // a wait that is longer is explained

export class Answer {
  #turn;
  #run;
  #frame = 0;
  #waiting = 0;
  #text = element("div", { className: "text" });
  #thoughts = element("div", { className: "text" });
  #summary = element("summary", {}, "Thinking");
  #folded = element("details", { className: "reasoning", hidden: true }, this.#summary, this.#thoughts);
  #wait = element("p", { className: "wait", hidden: true });
  #error = element("p", { className: "error", role: "alert", hidden: true });
  #figures = element("span", { className: "figures" });
  #row;
  #resume;

  /** `run` is what is known of its growing, undefined for one that is complete. */
  constructor(turn, versions, actions, run) {
    this.#turn = turn;
    this.#run = run;
    const startEdit = () =>
      editInPlace(this.#text, turn.content, [["Save", (content) => actions.reword(turn, content)]]);
    const repeat = button("Retry", () => actions.repeat(turn), { className: "changes" });
    this.#resume = button("Continue", () => actions.resume(turn), { className: "changes resume" });
    this.#row = actionRow(turn, versions, actions, startEdit, repeat, this.#resume);
    this.#row.append(this.#figures);
    this.item = element("li", { className: "answer" },
      element("span", { className: "unseen" }, "Answer: "),
      this.#folded, this.#text, this.#wait, this.#error, this.#row);
    if (run) {
      this.item.classList.add("growing");
      this.#row.hidden = true;
      this.draw();
      setTimeout(() => this.draw(), SILENT_MS);
    } else this.finish();
  }

  /** Its text as it is read aloud. */
  get spoken() {
    return this.#text.innerText || this.#turn.error || this.#turn.note;
  }

  /** Have `draw()` called once before the page is painted next. */
  grow(draw) {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      draw();
    });
  }

  /** Tell how many requests the server has in its queue. */
  tellQueue(waiting) {
    this.#waiting = waiting;
    if (this.#run) this.#drawWait();
  }

  /** Show the turn as it is now. */
  draw() {
    const { reasoning = "", content } = this.#turn;
    this.#folded.hidden = !reasoning;
    // Models begin with line breaks that are no part of what they say.
    render(this.#thoughts, reasoning.trimStart());
    render(this.#text, content.trimStart());
    this.#drawWait();
  }

  /** Show the whole turn, and why and how fast it ended. */
  finish() {
    cancelAnimationFrame(this.#frame);
    this.#run = undefined;
    this.draw();
    this.item.classList.remove("growing");
    this.#row.hidden = false;
    this.#summary.textContent = "Thoughts";
    const { note, error } = this.#turn;
    this.#error.textContent = error ?? "";
    this.#error.hidden = !error;
    this.#resume.hidden = !this.#turn.content || !(note || error);
    const left = isUnanswered(this.#turn) ? "the model is not sent this nor its question" : "";
    this.#figures.textContent = [note, paceOf(this.#turn), left].filter(Boolean).join(" · ");
  }

  #drawWait() {
    const { reasoning, content } = this.#turn;
    const isSilent = this.#run !== undefined && !reasoning && !content;
    const words = isSilent ? this.#waitingFor() : "";
    this.#wait.hidden = !words;
    if (!words) return;
    const { total, processed } = this.#run.progress ?? {};
    const bar = total ? element("progress", { max: total, value: processed, ariaLabel: "Prompt read" }) : null;
    this.#wait.replaceChildren(words, ...(bar ? [bar] : []));
  }

  #waitingFor() {
    const { progress, began } = this.#run;
    if (performance.now() - began < SILENT_MS) return "";
    if (this.#waiting > 0 && !progress?.processed) {
      return `Waiting for a free place: ${this.#waiting} ${this.#waiting === 1 ? "request is" : "requests are"} queued`;
    }
    if (progress) {
      const { total, cache, processed } = progress;
      const known = cache > 0 ? `, ${cache} of them known from earlier` : "";
      return `Reading the prompt: ${processed} of ${total} tokens${known}`;
    }
    return "Reading the prompt";
  }
}
