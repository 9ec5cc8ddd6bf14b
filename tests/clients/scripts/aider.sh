# aider: pip install aider-chat. It calls no tools: files stand beside the question.
aider --version
export OPENAI_API_BASE=$URL/v1 OPENAI_API_KEY=$KEY
say() { aider --model openai/scripted --yes-always --no-git --no-check-update --analytics-disable \
  --no-show-model-warnings --no-pretty --no-detect-urls --read "$NOTE" "$@"; }
say --message "$FIRST"
second_turn
say --restore-chat-history --message "$SECOND"
