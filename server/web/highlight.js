// Code in colours. highlight.js finds the words, and is fetched with the grammar of a language when a block of that
// language is first shown. It makes a tree of scopes, from which elements are built here: no markup is parsed.

import { element } from "./dom.js";

const MOST_CHARACTERS = 50_000; // longer code stays plain

/** Grammars under vendor/highlight/, with the names that models give to their languages. */
const LANGUAGES = {
  bash: "sh zsh shell console", c: "h", cpp: "c++ cc hpp cxx", csharp: "cs c#", css: "", diff: "patch",
  dockerfile: "docker", go: "golang", ini: "toml conf", java: "", javascript: "js jsx mjs cjs node",
  json: "jsonc json5 jsonl", kotlin: "kt kts", lua: "", makefile: "make mk", markdown: "md", php: "",
  powershell: "ps1 pwsh ps", python: "py python3 pycon", r: "", ruby: "rb", rust: "rs", sql: "postgresql mysql sqlite",
  swift: "", typescript: "ts tsx mts", xml: "html xhtml svg vue", yaml: "yml",
};
const GRAMMARS = new Map(
  Object.entries(LANGUAGES).flatMap(([name, others]) => [name, ...others.split(" ")].map((each) => [each, name])),
);

const loaded = new Map(); // promises of {hljs, name}, by grammar

function load(name) {
  if (!loaded.has(name)) {
    const fetched = Promise.all([
      import("./vendor/highlight/core.min.js"), import(`./vendor/highlight/${name}.min.js`),
    ]).then(([{ default: hljs }, { default: grammar }]) => {
      hljs.registerLanguage(name, grammar);
      return hljs;
    });
    loaded.set(name, fetched);
  }
  return loaded.get(name);
}

/** Colour `place`, an element that contains `code`, as soon as its language is known. */
export async function highlight(place, code, language) {
  const name = GRAMMARS.get(language.toLowerCase());
  if (!name || code.length > MOST_CHARACTERS) return;
  try {
    const hljs = await load(name);
    const { rootNode } = hljs.highlight(code, { language: name, ignoreIllegals: true })._emitter;
    place.replaceChildren(...rootNode.children.map(coloured));
  } catch (error) {
    console.warn("code stays plain:", error);
  }
}

/** A scope such as `title.function` becomes a span of the class `hljs-title`. */
function coloured(node) {
  if (typeof node === "string") return node;
  const children = node.children.map(coloured);
  const kind = node.scope?.split(".")[0];
  return element("span", kind ? { className: `hljs-${kind}` } : {}, ...children);
}
