// Short words above the composer: what went wrong outside of an answer, and what can still be undone.

import { button } from "./actions.js";
import { element } from "./dom.js";

const UNDO_MS = 12_000;

const place = document.querySelector("#notice");
let timer = 0;

/** Say something. With `undo` there is a button that takes it back, for a while; without, it stays until closed. */
export function say(text, undo = null) {
  clearTimeout(timer);
  const act = () => {
    hide();
    undo?.();
  };
  place.replaceChildren(element("span", {}, text), button(undo ? "Undo" : "Close", act));
  if (undo) timer = setTimeout(hide, UNDO_MS);
}

/** Say nothing any more. */
export function hide() {
  clearTimeout(timer);
  place.replaceChildren();
}
