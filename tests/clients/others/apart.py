"""Tests of other servers that are not asked of Loci, and why."""

from __future__ import annotations

from tests.clients.others.checks import Left
from tests.clients.others.llama_cpp import LLAMA_CPP
from tests.clients.others.vllm import VLLM
from tests.clients.others.vllm_responses import VLLM_MESSAGES

_THEIR_MODEL = "a model of theirs is downloaded, and its words are compared"
_THEIR_CODE = "functions and classes of theirs are called, not a server"
_VISION = "this server reads text only, and refuses images, recordings and films by name"
_NO_EMBEDDINGS = "no embeddings are given out ([api.md](api.md))"
_ONE_MODEL = "one process serves one model, which stays loaded"
_NO_TOOLS = "this server runs no tools of its own"

LEFT = [
    Left(LLAMA_CPP.folder, file, tests, why)
    for file, tests, why in (
        ("test_basic.py", "test_load_split_model", _THEIR_MODEL),
        ("test_basic.py", "test_server_model_aliases_and_tags", "flags; each name is an entry of its own"),
        (
            "test_chat_completion.py",
            "test_chat_template, test_chat_template_assistant_prefill",
            "`__verbose` of a debug flag, templates by flag; `continue_final_message` continues a message",
        ),
        (
            "test_chat_completion.py",
            "test_completion_with_json_schema, test_completion_with_grammar",
            "`json_schema` and `grammar` are refused, naming `response_format` and `structured_outputs`",
        ),
        (
            "test_chat_completion.py",
            "test_chat_completion_with_timings_per_token",
            "`timings` are not part of answers; `/metrics` has them",
        ),
        ("test_completion.py", "test_completion_stream_with_openai_library_stops", _THEIR_MODEL),
        (
            "test_completion.py",
            "test_completion_response_fields, test_n_probs_post_sampling",
            "fields of `/completion`; log probabilities are the model's own",
        ),
        ("test_ctx_shift.py", "test_ctx_shift_enabled", "prompts are never cut"),
        (
            "test_ignore_eos.py",
            "test_ignore_eos_false_no_logit_bias",
            "`generation_settings` of `/completion`",
        ),
        (
            "test_compat_anthropic.py",
            "test_anthropic_empty_messages",
            "an empty conversation is refused, as by Anthropic's API",
        ),
        ("test_compat_anthropic.py", "test_anthropic_vision_base64_with_multimodal_model", _VISION),
        ("test_compat_anthropic.py", "test_anthropic_thinking_with_reasoning_model", _THEIR_MODEL),
        ("test_security.py", "test_local_media_file", _VISION),
        ("test_template.py", "*", "templates and flags of theirs"),
        ("test_tool_call.py", "*", _THEIR_MODEL),
        ("test_vision_api.py", "*", _VISION),
        ("test_embedding.py", "*", _NO_EMBEDDINGS),
        ("test_rerank.py", "*", _NO_EMBEDDINGS),
        ("test_infill.py", "*", "filling in the middle is not supported; `suffix` is refused by name"),
        ("test_lora.py", "*", "no adapters"),
        ("test_speculative.py", "*", "flags and models of theirs; drafts never change an answer"),
        (
            "test_slot_save.py",
            "*",
            "clients save no slots: states are kept, and written to disk, by the server itself",
        ),
        ("test_kv_keep_only_active.py", "*", "flags of theirs"),
        ("test_router.py", "*", _ONE_MODEL),
        ("test_sleep.py", "*", _ONE_MODEL),
        ("test_stream.py", "*", "a router's streams; an answer ends with its connection"),
        ("test_tools_builtin.py", "*", _NO_TOOLS),
        ("test_mcp_servers.py", "*", _NO_TOOLS),
        ("test_proxy.py", "*", _NO_TOOLS),
        ("test_compat_gcp.py", "*", "routes of a cloud's service"),
    )
]
LEFT += [
    Left(VLLM.folder, file, tests, why)
    for file, tests, why in (
        ("basic/test_basic.py", "test_server_load", "a flag; `/metrics` has the load"),
        ("basic/test_basic.py", "test_health_check_engine_dead_error", _THEIR_CODE),
        ("basic/test_return_token_ids.py", "*", "`return_token_ids` is refused by name"),
        ("basic/test_chat_template.py", "*", _THEIR_CODE),
        ("basic/test_cli_args.py", "*", _THEIR_CODE),
        ("chat_completion/test_chat.py", "test_custom_role", "roles that no model knows are refused"),
        ("chat_completion/test_chat.py", "test_invocations", "a route of a cloud's service"),
        ("chat_completion/test_chat.py", "*", _THEIR_CODE),
        (
            "chat_completion/test_chat_echo.py",
            "test_prompt_logprobs, test_top_logprobs",
            "a flag that allows log probabilities of the whole vocabulary",
        ),
        ("chat_completion/test_non_object_body_validation.py", "*", _THEIR_CODE),
        ("chat_completion/, vision, audio, video, embeds, LoRA", "*", _VISION),
        ("chat_completion/, all others", "*", _THEIR_CODE),
        (
            "completion/test_completion.py",
            "test_completion_truncation_side_controls_prompt_truncation",
            "`truncate_prompt_tokens` is refused by name: prompts are never cut",
        ),
        (
            "completion/test_prompt_validation.py",
            "*",
            "embeddings as prompts and hidden states; refused by name",
        ),
        ("completion/, all others", "*", f"{_THEIR_CODE}; or flags, adapters, embeddings"),
        ("responses/test_simple.py", "test_enable_response_messages", "a field for debugging"),
        (
            "responses/test_stateful.py",
            "test_background, test_background_cancel",
            "`background` is refused by name",
        ),
        ("responses/, all others", "*", f"{_THEIR_CODE}; {_NO_TOOLS}; or web sockets"),
        ("tool_parsers/", "*", f"{_THEIR_CODE}; [prompts.md](prompts.md) lists calls that are read here"),
        ("embedding_tests/, correctness/", "*", f"{_NO_EMBEDDINGS}; or models of theirs"),
    )
]
LEFT.append(Left(VLLM_MESSAGES.folder, "all others", "*", _THEIR_CODE))
