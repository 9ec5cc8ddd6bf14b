# Continue's command line: npm install @continuedev/cli
cn --version
cat > config.yaml <<END
name: Loci
version: 1.0.0
schema: v1
models:
  - name: Loci
    provider: openai
    model: scripted
    apiBase: $URL/v1
    apiKey: $KEY
    roles: [chat]
    capabilities: [tool_use]
END
cn --config config.yaml --auto -p "$FIRST"
second_turn
cn --config config.yaml --auto --resume -p "$SECOND"
