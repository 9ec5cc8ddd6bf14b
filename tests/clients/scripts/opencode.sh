# opencode: npm install opencode-ai
opencode --version
cat > opencode.json <<END
{
  "provider": {
    "loci": {
      "npm": "@ai-sdk/openai-compatible",
      "options": {"baseURL": "$URL/v1", "apiKey": "$KEY"},
      "models": {"scripted": {"name": "Loci"}}
    }
  }
}
END
opencode run -m loci/scripted "$FIRST"
second_turn
opencode run -m loci/scripted --continue "$SECOND"
