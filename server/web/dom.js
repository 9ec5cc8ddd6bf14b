// Elements built in one expression. Text becomes text nodes, never markup.

/**
 * An element with properties and children: `element("a", {href}, "text", other)`.
 * Properties of the element are set as such, all others as attributes; null children are left out.
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/** A button that copies what `text()` returns, and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = element("button", { type: "button" }, label);
  button.addEventListener("click", async () => {
    const done = await copied(text());
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

/** True once the text is in the clipboard. Pages served over plain http to another machine have no clipboard. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
