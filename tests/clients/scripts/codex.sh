# Codex: npm install @openai/codex
codex --version
export LOCI_API_KEY=$KEY CODEX_HOME=$HOME/.codex
mkdir -p "$CODEX_HOME"
cat > "$CODEX_HOME/config.toml" <<END
model = "scripted"
model_provider = "loci"

[model_providers.loci]
name = "Loci"
base_url = "$URL/v1"
env_key = "LOCI_API_KEY"
wire_api = "responses"
END
codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "$FIRST"
second_turn
codex exec resume --last --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "$SECOND"
