# Claude Code: npm install @anthropic-ai/claude-code
claude --version
export ANTHROPIC_BASE_URL=$URL ANTHROPIC_AUTH_TOKEN=$KEY
claude -p "$FIRST"
second_turn
claude -p --continue "$SECOND"
