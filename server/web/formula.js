// TeX formulas as MathML, which browsers set by themselves. Temml, which translates, is fetched when the first
// formula is shown; until then, and where it finds a mistake, the formula is shown as it was written.

import { element } from "./dom.js";

const MOST_CHARACTERS = 5000;
const OPTIONS = {
  trust: false, // no links, classes or ids
  throwOnError: true,
  maxExpand: 300,
  maxSize: [20, 200],
  macros: { "\\pmb": "\\boldsymbol{#1}" }, // Temml's own writes a style attribute, which the page's policy forbids
};

let loading = null;

function temml() {
  loading ??= new Promise((resolve, reject) => {
    const src = new URL("vendor/temml/temml.min.js", import.meta.url).href;
    const onerror = () => {
      loading = null; // the next formula tries again
      reject();
    };
    const script = element("script", { src, onload: () => resolve(window.temml), onerror });
    document.head.append(script);
  });
  return loading;
}

/** An element with the formula `tex`, on a line of its own where `isDisplay`. */
export function formula(tex, isDisplay) {
  // A wide one scrolls, and what scrolls must be reachable by keyboard.
  const place = isDisplay
    ? element("div", { className: "formula", tabIndex: 0 })
    : element("span", { className: "formula" });
  place.append(element("code", {}, tex.trim()));
  if (tex.length > MOST_CHARACTERS) return place;
  if (window.temml) set(window.temml, place, tex, isDisplay);
  else {
    temml().then(
      (loaded) => set(loaded, place, tex, isDisplay),
      () => {}, // the server is gone, or older than the page: it stays as it was written
    );
  }
  return place;
}

function set(loaded, place, tex, displayMode) {
  const made = element(place.tagName);
  try {
    loaded.render(tex, made, { ...OPTIONS, macros: { ...OPTIONS.macros }, displayMode });
    place.replaceChildren(...made.childNodes);
  } catch {
    place.title = "This formula has a mistake.";
  }
}
