# lm-eval: pip install 'lm-eval[api]'. A task of one question, another that goes on with it, and scores of a text.
python -c 'from importlib.metadata import version; print("lm-eval", version("lm-eval"))'
export OPENAI_API_KEY=$KEY HF_HOME=$HOME/hf
word=$(cat "$NOTE")
task() { # name, question
  cat > "$1.yaml" <<END
task: $1
dataset_path: json
dataset_kwargs: {data_files: $PWD/$1.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "$word"
generation_kwargs: {until: ["<end>"], max_gen_toks: 60}
metric_list: [{metric: exact_match}]
END
  echo "{\"question\": \"$2 The file has: $word\"}" > "$1.jsonl"
  lm_eval run --model local-chat-completions --tasks "$1" --include_path . --apply_chat_template --log_samples \
    --model_args "model=scripted,base_url=$URL/v1/chat/completions" --output_path "out-$1" 1>&2
  cat "out-$1"/*/samples_*.jsonl | grep -o '"resps": [^]]*'
}
task first "$FIRST"
second_turn
task second "$FIRST It says $word. $SECOND"
