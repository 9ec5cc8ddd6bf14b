// What a person wrote, on the page.

import { actionRow, editInPlace } from "./actions.js";
import { element } from "./dom.js";
import { sizeOf } from "./files.js";

/** The list item of a question. `actions` are what its buttons do. */
export function question(turn, versions, actions) {
  const text = element("div", { className: "text" }, turn.content);
  const startEdit = () =>
    editInPlace(text, turn.content, [
      ["Send", (content) => actions.rephrase(turn, content)],
      ["Save", (content) => actions.reword(turn, content)],
    ]);
  return element("li", { className: "question" },
    element("span", { className: "unseen" }, "You: "),
    ...(turn.files ?? []).map(attached),
    text,
    actionRow(turn, versions, actions, startEdit),
  );
}

function attached({ name, text }) {
  return element("details", { className: "attached" },
    element("summary", {}, `${name} `, element("small", {}, sizeOf(text))),
    element("pre", { tabIndex: 0 }, text));
}
