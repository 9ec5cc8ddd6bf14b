// What can be done with a message: the row of buttons below it, the switch between versions, and changing its words.

import { copyButton, element } from "./dom.js";

/** A button that says `label` and does `act()`. `name` says to a screen reader what it is about. */
export function button(label, act, properties = {}) {
  const made = element("button", { type: "button", ...properties }, label);
  made.addEventListener("click", act);
  return made;
}

/**
 * The row below a message: the switch between `versions`, copy, edit, `more` buttons, delete. `startEdit()` shows the
 * editor. Buttons of the class `changes` are out of reach while an answer grows.
 */
export function actionRow(turn, versions, actions, startEdit, ...more) {
  return element("div", { className: "actions" },
    versionSwitch(turn, versions, actions),
    copyButton(() => turn.content),
    button("Edit", startEdit, { className: "changes" }),
    ...more,
    button("Delete", () => actions.remove(turn), { className: "changes" }),
  );
}

function versionSwitch(turn, versions, actions) {
  if (versions.length < 2) return null;
  const at = versions.indexOf(turn);
  const step = (label, name, to) =>
    button(label, () => actions.choose(versions[to]), {
      className: "changes", ariaLabel: name, disabled: versions[to] === undefined,
    });
  return element("span", { className: "versions" },
    step("‹", "Earlier version", at - 1),
    element("span", {}, element("span", { className: "unseen" }, "Version "), `${at + 1}/${versions.length}`),
    step("›", "Later version", at + 1),
  );
}

/**
 * Puts an editor with `text` into the place of `shown`, until one of `choices` (`[[label, act]]`, the first for
 * Control+Enter) is taken (`act(text)` returns true) or Escape ends it.
 */
export function editInPlace(shown, text, choices) {
  const field = element("textarea", { value: text, ariaLabel: "Edit message", rows: 3 });
  const close = () => {
    editor.replaceWith(shown);
    shown.closest("li")?.querySelector(".actions button:not([disabled])")?.focus();
  };
  const choose = (act) => {
    if (act(field.value.trim())) close();
  };
  const buttons = choices.map(([label, act], i) =>
    button(label, () => choose(act), i === 0 ? { className: "primary" } : {}),
  );
  const editor = element("div", { className: "editor" }, field,
    element("div", { className: "buttons" }, button("Cancel", close), ...buttons.reverse()));
  const fit = () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  };
  field.addEventListener("input", fit);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation(); // it ends this, not an answer
      close();
    }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) choose(choices[0][1]);
  });
  shown.replaceWith(editor);
  fit();
  field.focus();
}
