// Where a person writes: text and attached files. What is written but not sent is a draft; there is one for each
// conversation, and it survives a reload.

import { button } from "./actions.js";
import { element } from "./dom.js";
import { Unreadable, readText, sizeOf } from "./files.js";
import { hide, say } from "./notices.js";

const PLACE = "loci.draft:";
const isTouched = matchMedia("(pointer: coarse)");

const form = document.querySelector("#composer");
const prompt = document.querySelector("#prompt");
const chips = document.querySelector("#files");
const chooser = document.querySelector("#choose-files");
const send = document.querySelector("#send");
const stop = document.querySelector("#stop");

export class Composer {
  #files = [];
  #draft = "new"; // whose draft this is: the id of a kept conversation, or "new"

  /** `onSend(text, files)` returns true where it has taken them. */
  constructor(onSend) {
    const submit = () => {
      const text = prompt.value.trim();
      if ((!text && this.#files.length === 0) || send.hidden || !onSend(text, this.#files)) return;
      this.#fill({ text: "", files: [] });
      this.#keep();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    prompt.addEventListener("input", () => {
      this.#fit();
      this.#keep();
    });
    prompt.addEventListener("keydown", (event) => {
      // On phones the return key begins a line. While an input method composes, it belongs to it.
      const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (!sends || isTouched.matches) return;
      event.preventDefault();
      submit();
    });
    document.querySelector("#attach").addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", async () => {
      await this.#attach([...chooser.files]);
      chooser.value = "";
    });
    this.#takeDropped();
  }

  /** Go on with the draft of the conversation of this id, or of one that is not kept yet (null). */
  turnTo(id) {
    this.#draft = id ?? "new";
    this.#fill(stored(PLACE + this.#draft));
  }

  /** The draft goes along with a conversation that has just been kept for the first time. */
  adopt(id) {
    if (this.#draft !== "new") return;
    localStorage.removeItem(PLACE + this.#draft);
    this.#draft = id;
    this.#keep();
  }

  /** Stop instead of Send while an answer grows. */
  setBusy(isBusy) {
    send.hidden = isBusy;
    stop.hidden = !isBusy;
  }

  /** Put the keyboard here. Not on phones, where it would cover half of the conversation. */
  focus() {
    if (!isTouched.matches) prompt.focus();
  }

  /** Put the keyboard here if what had it is gone, so that it is never taken out of anybody's hands. */
  focusIfLost() {
    const at = document.activeElement;
    if (!at || at === document.body || !at.checkVisibility()) this.focus();
  }

  #fill({ text, files }) {
    prompt.value = text;
    this.#files = files;
    this.#showFiles();
    this.#fit();
  }

  /** As high as its text, within what the style sheet allows. */
  #fit() {
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight + 2}px`;
  }

  #keep() {
    const place = PLACE + this.#draft;
    try {
      if (prompt.value || this.#files.length) {
        localStorage.setItem(place, JSON.stringify({ text: prompt.value, files: this.#files }));
      } else localStorage.removeItem(place);
    } catch {
      localStorage.removeItem(place);
      say("This draft is too long to be kept: a reload would lose it.");
    }
  }

  async #attach(files) {
    const read = await Promise.allSettled(files.map(readText));
    hide();
    for (const { value, reason } of read) {
      if (value) this.#files = [...this.#files, value];
      else say(reason instanceof Unreadable ? reason.message : "The file cannot be read.");
    }
    this.#showFiles();
    this.#keep();
    this.focus();
  }

  #takeDropped() {
    const isFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      this.#attach([...event.dataTransfer.files]);
    });
    prompt.addEventListener("paste", (event) => {
      if (!event.clipboardData?.files.length) return;
      event.preventDefault();
      this.#attach([...event.clipboardData.files]);
    });
  }

  #showFiles() {
    chips.hidden = this.#files.length === 0;
    chips.replaceChildren(...this.#files.map((file) => {
      const remove = () => {
        this.#files = this.#files.filter((each) => each !== file);
        this.#showFiles();
        this.#keep();
        this.focus();
      };
      return element("li", {}, `${file.name} `, element("small", {}, sizeOf(file.text)),
        button("×", remove, { ariaLabel: `Remove ${file.name}` }));
    }));
  }
}

/** Forget the draft of a conversation that is no more. */
export function forgetDraft(id) {
  localStorage.removeItem(PLACE + id);
}

function stored(place) {
  try {
    const { text, files } = JSON.parse(localStorage.getItem(place));
    return { text: String(text), files: files.map(({ name, text }) => ({ name: String(name), text: String(text) })) };
  } catch {
    return { text: "", files: [] };
  }
}
