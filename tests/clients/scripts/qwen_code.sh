# Qwen Code: npm install @qwen-code/qwen-code
qwen --version
export OPENAI_BASE_URL=$URL/v1 OPENAI_API_KEY=$KEY OPENAI_MODEL=scripted
qwen --auth-type openai -y -p "$FIRST"
second_turn
qwen --auth-type openai -y --continue -p "$SECOND"
