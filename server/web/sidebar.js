// The list of conversations: open, search, rename, export, delete.

import { button } from "./actions.js";
import { element } from "./dom.js";
import { exportAll, exportOne, importAll } from "./exchange.js";

const SEARCH_MS = 200; // after the last key

const bar = document.querySelector("#sidebar");
const toggle = document.querySelector("#toggle-sidebar");
const shade = document.querySelector("#shade");
const search = document.querySelector("#search");
const list = document.querySelector("#conversations");
const empty = document.querySelector("#no-conversations");
const narrow = matchMedia("(max-width: 56rem)");
const CLOSED = "loci.sidebar-closed";

export class Sidebar {
  #library;
  #chat;
  #state = ""; // of what the list shows
  #found = null; // ids, while something is searched for
  #renamed = null; // the id whose title is being written
  #actions;
  #timer = 0;

  /** `actions`: `open(id)` and `remove(id, name)`. */
  constructor(library, chat, actions) {
    this.#library = library;
    this.#chat = chat;
    this.#actions = actions;
    toggle.addEventListener("click", () => this.#setOpen(bar.hidden, true));
    shade.addEventListener("click", () => this.#setOpen(false));
    narrow.addEventListener("change", () => this.#fold());
    bar.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !narrow.matches) return;
      event.stopPropagation();
      this.#setOpen(false);
    });
    search.addEventListener("input", () => {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.#search(), SEARCH_MS);
    });
    document.querySelector("#export-all").addEventListener("click", () => exportAll(library));
    const chooser = document.querySelector("#choose-import");
    document.querySelector("#import").addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", async () => {
      await importAll(library, chooser.files[0]);
      chooser.value = "";
    });
    this.#fold();
  }

  /** Show the list as it is now. */
  show() {
    if (this.#renamed) return; // not under the hands of whoever is writing
    const shown = this.#library.summaries.filter(({ id }) => this.#found?.has(id) ?? true);
    const states = shown.map(({ id, name }) => [id, name, this.#chat.isAnswering(id)]);
    const state = JSON.stringify([states, this.#chat.conversation.id, this.#found !== null]);
    if (state === this.#state) return; // a click that has begun must find its button at its end
    this.#state = state;
    // What is unfolded or focused stays so, though the list is made anew.
    const unfolded = list.querySelector("details[open]")?.closest("li").dataset.id;
    const focused = list.contains(document.activeElement) ? keyOf(document.activeElement) : null;
    list.replaceChildren(...shown.map((summary) => this.#entry(summary, summary.id === unfolded)));
    if (focused) [...list.querySelectorAll("button, summary")].find((each) => keyOf(each) === focused)?.focus();
    empty.hidden = shown.length > 0;
    empty.textContent = this.#found ? "Nothing found." : "None yet.";
  }

  /** On a narrow screen the list lies over the conversation and goes when it has done its work. */
  leave() {
    if (narrow.matches) this.#setOpen(false);
  }

  async #search() {
    const words = search.value.trim();
    const found = words ? await this.#library.search(words) : null;
    if (words !== search.value.trim()) return; // something else is searched for by now
    this.#found = found && new Set(found.map(({ id }) => id));
    this.show();
  }

  #entry({ id, name }, isUnfolded) {
    const isShown = id === this.#chat.conversation.id;
    const open = button(element("span", { className: "name" }, name), () => this.#actions.open(id), { className: "open" });
    if (isShown) open.setAttribute("aria-current", "true");
    if (this.#chat.isAnswering(id)) open.append(element("span", { className: "answering" }, "answering"));
    const rename = () => {
      this.#renamed = id;
      this.#state = "";
      list.querySelector(`[data-id="${id}"]`).replaceWith(this.#nameField(id, name));
      list.querySelector("input").select();
    };
    const menu = element("details", { open: isUnfolded },
      element("summary", { ariaLabel: `More for ${name}` }, "⋯"),
      element("div", { className: "menu" },
        button("Rename", rename),
        button("Export", async () => exportOne(await this.#chat.find(id))),
        button("Delete", () => this.#actions.remove(id, name))));
    const item = element("li", {}, open, menu);
    item.dataset.id = id;
    return item;
  }

  #nameField(id, name) {
    const field = element("input", { value: name, ariaLabel: "Title", maxLength: 200 });
    const end = async (title) => {
      if (this.#renamed !== id) return; // leaving the field after Enter
      this.#renamed = null;
      if (title) await this.#chat.rename(id, title);
      this.show();
      list.querySelector(`[data-id="${id}"] .open`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(field.value.trim());
      if (event.key === "Escape") {
        event.stopPropagation();
        end("");
      }
    });
    field.addEventListener("blur", () => end(field.value.trim()));
    const item = element("li", {}, field);
    item.dataset.id = id;
    return item;
  }

  #fold() {
    this.#setOpen(!narrow.matches && localStorage.getItem(CLOSED) !== "true");
  }

  #setOpen(isOpen, isChosen = false) {
    const had = bar.contains(document.activeElement);
    bar.hidden = !isOpen;
    shade.hidden = !isOpen || !narrow.matches;
    toggle.setAttribute("aria-expanded", String(isOpen));
    if (isChosen && !narrow.matches) localStorage.setItem(CLOSED, String(!isOpen));
    if (isChosen && isOpen && narrow.matches) search.focus();
    if (had && !isOpen) toggle.focus();
  }
}

const keyOf = (node) => `${node.closest("li")?.dataset.id} ${node.tagName} ${node.textContent}`;
