# guidellm: pip install guidellm. It sends prompts and keeps the answers.
guidellm --version
export HF_HOME=$HOME/hf HF_HUB_OFFLINE=1
ask() { # name, question
  echo "{\"prompt\": \"$2 The file has: $(cat "$NOTE")\"}" > "$1.jsonl"
  guidellm run --backend "kind=openai_http,target=$URL,api_key=$KEY" --profile kind=synchronous \
    --constraint kind=max_requests,count=1 --data "kind=json_file,path=$PWD/$1.jsonl" \
    --output "kind=json,path=$PWD/$1.json" --disable-console 1>&2
  grep -o '"output": "[^"]*"' "$1.json"
}
ask first "$FIRST"
second_turn
ask second "$FIRST $SECOND"
