# promptfoo: npm install promptfoo. An evaluation with a tool that it runs, then one of a conversation.
promptfoo --version
export PROMPTFOO_DISABLE_TELEMETRY=1 PROMPTFOO_DISABLE_UPDATE=1 PROMPTFOO_CONFIG_DIR=$HOME/.promptfoo OPENAI_API_KEY=$KEY
cat > tool.cjs <<'END'
module.exports = { read_file: async (given) => {
  const { path } = typeof given === 'string' ? JSON.parse(given) : given;
  return require('fs').readFileSync(path, 'utf8');
} };
END
evaluate() {
  cat > eval.yaml <<END
prompts: [file://prompt.json]
providers:
  - id: openai:chat:scripted
    config:
      apiBaseUrl: $URL/v1
      tools:
        - type: function
          function:
            name: read_file
            description: Reads a file
            parameters: {type: object, properties: {path: {type: string}}, required: [path]}
      functionToolCallbacks: {read_file: "file://tool.cjs:read_file"}
tests: [{vars: {}}]
END
  promptfoo eval -c eval.yaml --no-cache --no-table --no-progress-bar -o out.json 1>&2
  node -e 'for (const r of require("./out.json").results.results) console.log(r.response?.output ?? r.error)'
}
echo "[{\"role\": \"user\", \"content\": \"$FIRST\"}]" > prompt.json
evaluate | tee first.txt
second_turn
node -e '
const [first, second] = process.argv.slice(1);
const said = require("fs").readFileSync("first.txt", "utf8");
console.log(JSON.stringify([{role: "user", content: first}, {role: "assistant", content: said},
  {role: "user", content: second}]));' "$FIRST" "$SECOND" > prompt.json
evaluate
