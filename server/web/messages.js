// Messages on the page: what a person wrote, and answers as they grow.

import { copyButton, element } from "./dom.js";
import { render } from "./markdown.js";

const list = document.querySelector("#messages");
const scroller = document.querySelector("#scroller");
const welcome = document.querySelector("#welcome");

const NEAR_END_PX = 80; // whoever has scrolled up further wants to stay there

function add(item) {
  welcome.hidden = true;
  list.append(item);
  toEnd();
  return item;
}

/** Scroll to the end. */
export function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

const isNearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;

// A keyboard that opens on a phone, or one that is turned, must not hide the end from who was there.
let wasNearEnd = true;
scroller.addEventListener("scroll", () => (wasNearEnd = isNearEnd()));
new ResizeObserver(() => {
  if (wasNearEnd) toEnd();
}).observe(scroller);

/** Remove all messages from the one at `index` on. */
export function dropFrom(index) {
  while (list.children.length > index) list.lastChild.remove();
  welcome.hidden = list.children.length > 0;
}

/** Mark the message at `index` as being edited, or none where index is null. */
export function markEdited(index) {
  [...list.children].forEach((item, i) => item.classList.toggle("edited", i === index));
}

/** Show what a person wrote. `onEdit` is called when they want to change it. */
export function addQuestion(text, onEdit) {
  const edit = element("button", { type: "button" }, "Edit");
  edit.addEventListener("click", onEdit);
  add(
    element("li", { className: "question" },
      element("span", { className: "unseen" }, "You: "),
      element("div", { className: "text" }, text),
      element("div", { className: "actions" }, edit, copyButton(() => text)),
    ),
  );
}

/** An answer on the page. */
export class Answer {
  #frame = 0;

  /** `onRepeat` is called when a person wants another answer instead. */
  constructor(onRepeat) {
    this.content = "";
    this.reasoning = "";
    this.began = performance.now();
    this.firstAfter = null; // milliseconds until the first text
    this.text = element("div", { className: "text" });
    this.thoughts = element("div", { className: "text" });
    this.summary = element("summary", {}, "Thinking");
    this.folded = element("details", { className: "reasoning", hidden: true }, this.summary, this.thoughts);
    this.figures = element("span", { className: "figures" });
    const repeat = element("button", { type: "button", className: "repeat" }, "Retry");
    repeat.addEventListener("click", onRepeat);
    this.actions = element("div", { className: "actions", hidden: true },
      copyButton(() => this.content), repeat, this.figures);
    this.item = add(
      element("li", { className: "answer growing" },
        element("span", { className: "unseen" }, "Answer: "), this.folded, this.text, this.actions),
    );
  }

  /** Add pieces of reasoning and content. The page is drawn at most once a frame. */
  push({ reasoning, content }) {
    if (!reasoning && !content) return;
    this.firstAfter ??= performance.now() - this.began;
    this.reasoning += reasoning ?? "";
    this.content += content ?? "";
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Show the end: `note` says why it ended where that is not obvious, `tokens` how many there were. */
  finish(note = "", tokens = null) {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.item.classList.remove("growing");
    this.actions.hidden = false;
    this.figures.textContent = [note, this.#pace(tokens)].filter(Boolean).join(" · ");
    if (this.reasoning) this.summary.textContent = "Thoughts";
  }

  /** Show an error below what there is of the answer. */
  fail(message) {
    this.finish();
    this.actions.before(element("p", { className: "error", role: "alert" }, message));
  }

  #draw() {
    this.#frame = 0;
    const follows = isNearEnd();
    this.folded.hidden = !this.reasoning;
    // Models begin with line breaks that are no part of what they say.
    render(this.thoughts, this.reasoning.trimStart());
    render(this.text, this.content.trimStart());
    if (follows) toEnd();
  }

  #pace(tokens) {
    if (!tokens || this.firstAfter === null) return "";
    const seconds = (performance.now() - this.began - this.firstAfter) / 1000;
    const speed = tokens > 1 && seconds > 0 ? ` · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const first = ` · first after ${(this.firstAfter / 1000).toFixed(1)} s`;
    return `${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}${first}`;
  }
}
