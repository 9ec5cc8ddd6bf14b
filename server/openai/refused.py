"""Fields, most of them of other servers, that would change an answer and that nothing here can honour.

Ignoring them would give an answer that the client did not ask for; so they are refused by name, unless their
value asks for nothing or for what happens anyway. docs/api.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from quant.errors import RequestError

NOTHING: tuple[Any, ...] = (None, False, "", [])


class Refused(NamedTuple):
    """Why a field is refused, and the values with which it is not."""

    why: str
    harmless: tuple[Any, ...]

    def lets_through(self, value: object) -> bool:
        """Whether the field may be ignored with this value; 0 is not false, nor 1 true."""
        return any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.harmless
        )


def unless(why: str, *harmless: Any) -> Refused:
    """A field that is refused unless its value is nothing or one of `harmless`."""
    return Refused(why, (*NOTHING, *harmless))


def only(why: str, *harmless: Any) -> Refused:
    """A field whose false means something: refused unless its value is null or one of `harmless`."""
    return Refused(why, (None, *harmless))


def refuse_fields(data: Any, refused: Mapping[str, Refused], path: str = "") -> Any:
    """`data` as it came. Raises RequestError where it has a field that is `refused` with its value."""
    if isinstance(data, dict):
        for name, value in data.items():
            rule = refused.get(name)
            if rule is not None and not rule.lets_through(value):
                raise RequestError(
                    f"{path}{name} is not supported: {rule.why}",
                    param=f"{path}{name}",
                    code="unsupported_parameter",
                )
    return data


# How many of the newest tokens penalties count, in other servers.
WINDOWS = ("repeat_last_n", "penalty_last_n", "repetition_penalty_range", "rep_pen_range")
PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}


def refuse_windows(data: Any) -> Any:
    """`data` as it came. Raises RequestError where penalties are to count a part of the answer only."""
    if isinstance(data, dict) and any(data.get(name) not in (None, off) for name, off in PENALTIES.items()):
        windows = dict.fromkeys(WINDOWS, only("penalties count the whole answer", -1))
        refuse_fields(data, windows | {"penalize_nl": only("penalties count line breaks too", True)})
    return data


_BY_THEMSELVES = "send its fields at the top level, under this API's names"
_NO_SAMPLER = "this server does not have that sampler"
_NO_BUDGET = "reasoning is not limited separately from the answer"
_NO_BEAMS = "answers are sampled"
_NO_IMAGES = "only text input is supported"
_OWN_TEMPLATE = "the model's own template is used; chat_template_kwargs sets its variables"
_NOT_PART = "answers do not include it"
_SWITCH = "turn reasoning on or off with {}"

# Samplers that are off at 0, and those that are off at 1.
_OFF_AT_0 = (
    "top_a", "mirostat", "mirostat_mode", "dynatemp_range", "smoothing_factor", "xtc_probability",
    "dry_multiplier", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "no_repeat_ngram_size", "n_indent",
)  # fmt: skip
_OFF_AT_1 = ("typical_p", "typical", "tfs", "tfs_z", "encoder_repetition_penalty", "guidance_scale")
SAMPLERS = {
    **dict.fromkeys(_OFF_AT_0, unless(_NO_SAMPLER, 0)),
    **dict.fromkeys(
        ("dynamic_temperature", "watermark", "token_healing", "negative_prompt"), unless(_NO_SAMPLER)
    ),
    **dict.fromkeys(_OFF_AT_1, unless(_NO_SAMPLER, 1)),
    "top_n_sigma": unless(_NO_SAMPLER, 0, -1),
    "repeat_penalty": unless("use repetition_penalty, which counts the whole prompt and answer", 1),
    "min_keep": unless(_NO_SAMPLER, 0, 1),
    "samplers": unless("the order of samplers is fixed"),
    "sampler_order": unless("the order of samplers is fixed"),
    "sampler_priority": unless("the order of samplers is fixed"),
    "temperature_last": unless("the order of samplers is fixed"),
    "do_sample": only("use temperature: 0", True),
    "use_beam_search": unless(_NO_BEAMS),
    "num_beams": unless(_NO_BEAMS, 1),
    "beam_width": unless(_NO_BEAMS, 1),
    "logits_processors": unless("code in requests is not executed"),
    "custom_logit_processor": unless("code in requests is not executed"),
    "random_seed": unless("use seed"),
    "allowed_token_ids": unless("use structured_outputs.choice or logit_bias"),
    "bad_words": unless("use logit_bias"),
    "bad_words_ids": unless("use logit_bias"),
    "suppress_tokens": unless("use logit_bias"),
    "stop_words": unless("use stop"),
    "stop_regex": unless("use stop"),
    "no_stop_trim": unless("use include_stop_str_in_output"),
    "min_new_tokens": unless("use min_tokens", 0),
    "min_length": unless("use min_tokens", 0),
    "t_max_predict_ms": unless("disconnect or cancel the request when it takes too long", 0, -1),
    "adaptive_target": unless(_NO_SAMPLER, -1),
    "penalty_prompt": unless("repetition_penalty counts the whole prompt and answer"),
    "rep_pen": unless("use repetition_penalty, which counts the whole prompt and answer", 1),
    "repetition_detection": unless("disconnect or cancel the request when it repeats itself", {}),
    "sampling_params": unless(_BY_THEMSELVES, {}),
    "parameters": unless(_BY_THEMSELVES, {}),
    "extra_body": unless(_BY_THEMSELVES, {}),
    "vllm_xargs": unless("this server has no use for them", {}),
    "custom_params": unless("this server has no use for them", {}),
    "sampling_seed": unless("use seed"),
    "sampler_seed": unless("use seed", -1),
    "stop_strings": unless("use stop"),
    "stop_sequence": unless("use stop"),
    "ban_eos_token": unless("use ignore_eos"),
    "eos_token_id": only("use stop_token_ids"),
    "banned_tokens": unless("use logit_bias"),
    "banned_strings": unless("use logit_bias"),
    "custom_token_bans": unless("use logit_bias"),
    "preset": unless(_BY_THEMSELVES),
}
# What all protocols refuse.
COMMON = SAMPLERS | {
    "num_ctx": only("the context length is set when the server starts (--max-model-len)"),
    "n_ctx": only("the context length is set when the server starts (--max-model-len)"),
    "context_length": only("the context length is set when the server starts (--max-model-len)"),
    "options": unless(_BY_THEMSELVES, {}),
    "truncate_prompt_tokens": only("shorten the prompt"),
    "prompt_truncate_len": only("shorten the prompt"),
    "context_length_exceeded_behavior": unless("shorten the prompt", "error"),
    "transforms": unless("shorten the prompt"),
    "truncate": unless("shorten the prompt"),
    "shift": unless("an answer ends where the context does"),
    "template": unless(_OWN_TEMPLATE),
    "chat_template": unless(_OWN_TEMPLATE),
    "documents": unless("put them in messages"),
    "images": unless(_NO_IMAGES),
    "image_data": unless(_NO_IMAGES),
    "prompt_embeds": unless("send text or token ids"),
    "input_embeds": unless("send text or token ids"),
    "multimodal_data": unless(_NO_IMAGES),
    "session_params": unless("send the whole conversation", {}),
    "integrations": unless("this server does not call other servers"),
    "lora": unless("the model is served as it was loaded"),
    "lora_path": unless("the model is served as it was loaded"),
    "safe_prompt": unless("put it in a message"),
    "web_search_options": unless("this server does not search"),
    "search_parameters": unless("this server does not search"),
    "enable_search": unless("this server does not search"),
    "plugins": unless("this server does not call other servers"),
    "post_sampling_probs": unless("log probabilities are the model's own"),
    "return_token_ids": unless(_NOT_PART),
    "return_tokens": unless(_NOT_PART),
    "return_hidden_states": unless(_NOT_PART),
    "return_routed_experts": unless(_NOT_PART),
    "return_prompt_token_ids": unless(_NOT_PART),
    "return_meta_info": unless(_NOT_PART),
    "return_full_text": unless("use echo of /v1/completions"),
    "structural_tag": unless("use tools, or structured_outputs.grammar"),
    "include_reasoning": only("ignore reasoning_content in the answer", True),
    "separate_reasoning": only("reasoning is always separate from content", True),
    "reasoning_in_content": unless("reasoning is always separate from content"),
    "stream_reasoning": only("reasoning is part of the stream", True),
    "parse_tool_calls": only("tool calls are always separate from content", True),
    "thinking_forced_open": unless(_SWITCH.format("the protocol's field for it")),
    "generation_prompt": unless(_OWN_TEMPLATE),
    "reasoning_format": unless("reasoning is always separate from content", "auto", "deepseek"),
    "thinking_budget": only(_NO_BUDGET),
    "thinking_budget_tokens": only(_NO_BUDGET),
    "thinking_token_budget": only(_NO_BUDGET),
    "reasoning_budget": only(_NO_BUDGET, -1),
    "reasoning_budget_tokens": only(_NO_BUDGET, -1),
}
_FORMS = {
    "grammar_string": "grammar",
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "grammar": "grammar",
    "ebnf": "grammar",
    "regex": "regex",
}
_LENGTHS = ("n_predict", "num_predict", "max_new_tokens", "max_length", "max_output_tokens")
# Of /v1/chat/completions and /v1/completions.
REFUSED = (
    COMMON
    | {name: unless(f"use structured_outputs.{form}") for name, form in _FORMS.items()}
    | {name: only("use max_tokens") for name in _LENGTHS}
    | {
        "json_schema": unless("use response_format or structured_outputs.json"),
        "format": unless("use response_format"),
        "guided_whitespace_pattern": unless("white space is fixed"),
        "functions": unless("use tools"),
        "function_call": unless("use tool_choice"),
        "audio": unless("only text can be generated"),
        "system": unless("send a message of role system"),
        "system_prompt": unless("send a message of role system"),
        "instructions": unless("send a message of role system"),
        "stop_sequences": unless("use stop"),
        "n_cmpl": only("use n", 1),
        "num_return_sequences": only("use n", 1),
        "background": unless("answers are computed while the client waits; use stream"),
        "previous_response_id": unless("send the whole conversation, or use /v1/responses"),
        "conversation": unless("send the whole conversation"),
        "suffix": unless("filling in the middle is not supported"),
        "input_prefix": unless("filling in the middle is not supported"),
        "input_suffix": unless("filling in the middle is not supported"),
        "input_extra": unless("filling in the middle is not supported"),
        "context": unless("send the conversation as messages"),
        "n_probs": unless("use logprobs", 0),
        "top_logprobs_num": unless("use logprobs", 0),
        "top_n_tokens": unless("use logprobs", 0),
        "token_ids_logprob": unless("use logprobs"),
        "logprob_token_ids": unless("use logprobs"),
        "logprob_start_len": only("use echo and logprobs of /v1/completions", -1),
        "return_logprob": unless("use logprobs"),
        "think": only(_SWITCH.format("reasoning_effort or thinking")),
        "enable_thinking": only(_SWITCH.format("reasoning_effort or thinking")),
        "reasoning": only(_SWITCH.format("reasoning_effort or thinking"), {}),
        "output_config": unless("use reasoning_effort and response_format", {}),
        "output_format": unless("use response_format"),
        "text": unless("use response_format", {}, {"format": {"type": "text"}}),
        "prompt_mode": unless(_SWITCH.format("reasoning_effort or thinking")),
    }
)
# Of /v1/chat/completions alone.
CHAT_REFUSED = {
    "echo": unless("use continue_final_message"),
    "add_special_tokens": unless("the chat template adds the special tokens"),
    "best_of": unless("answers are not ranked", 1),
    "raw": unless("use /v1/completions"),
    "input_ids": unless("use /v1/completions with token ids as prompt"),
    "tool_prompt": unless(_OWN_TEMPLATE),
}
# Of /v1/completions alone, which know neither conversations nor tools.
COMPLETIONS_REFUSED = {
    "input_ids": unless("use prompt"),
    "add_bos_token": only("use add_special_tokens"),
    "tools": unless("use /v1/chat/completions"),
    "tool_choice": unless("use /v1/chat/completions", "none", "auto"),
    "reasoning_effort": unless("use /v1/chat/completions", "none"),
    "thinking": unless("use /v1/chat/completions", {}, {"type": "disabled"}),
    "chat_template_kwargs": unless("use /v1/chat/completions", {}),
    "continue_final_message": unless("use /v1/chat/completions"),
    "max_completion_tokens": only("use max_tokens"),
    "top_logprobs": only("use logprobs with a number"),
}
# Names of OpenAI's older interface, on routes that have others for it.
_ELSEWHERE = {
    "n": only("one answer is given", 1),
    "n_cmpl": only("one answer is given", 1),
    "num_return_sequences": only("one answer is given", 1),
    "system_prompt": unless("use the field that this interface has for it"),
    "best_of": only("answers are not ranked", 1),
    "chat_template_kwargs": unless("use /v1/chat/completions", {}),
    "continue_final_message": unless("use /v1/chat/completions"),
    "structured_outputs": unless("use a JSON schema, or /v1/chat/completions", {}),
    "think": only("use reasoning"),
    "enable_thinking": only("use reasoning"),
    "return_tokens_as_token_ids": unless(_NOT_PART),
    "prompt_logprobs": unless("use /v1/chat/completions"),
} | {name: unless("use a JSON schema, or /v1/chat/completions") for name in _FORMS}
RESPONSES_REFUSED = (
    COMMON
    | _ELSEWHERE
    | {name: only("use max_output_tokens") for name in (*_LENGTHS, "max_tokens", "max_completion_tokens")}
    | {
        "background": unless("answers are computed while the client waits; use stream"),
        "conversation": unless("send the items of the conversation, or previous_response_id"),
        "personality": unless("say it in instructions"),
        "prompt": unless("there are no stored prompts; send instructions and input"),
        "messages": unless("use input"),
        "system": unless("use instructions"),
        "stop_sequences": unless("use stop"),
        "response_format": unless("use text.format", {"type": "text"}),
        "output_config": unless("use reasoning.effort and text.format", {}),
        "format": unless("use text.format"),
        "reasoning_effort": unless("use reasoning.effort"),
        "thinking": only("use reasoning.effort"),
        "logprobs": unless("use include or top_logprobs"),
        "functions": unless("use tools"),
        "function_call": unless("use tool_choice"),
        "modalities": unless("only text can be generated", ["text"]),
        "audio": unless("only text can be generated"),
    }
)
del RESPONSES_REFUSED["max_output_tokens"]
MESSAGES_REFUSED = (
    COMMON
    | _ELSEWHERE
    | {name: only("use max_tokens") for name in (*_LENGTHS, "max_completion_tokens")}
    | {
        "mcp_servers": unless("this server does not call other servers"),
        "compaction": unless("conversations are answered, not summarized", {}),
        "thread": unless("send the whole conversation", {}),
        "container": unless("this server runs no tools of its own"),
        "output_format": unless("use output_config.format"),
        "response_format": unless("use output_config.format", {"type": "text"}),
        "format": unless("use output_config.format"),
        "reasoning_effort": unless("use thinking and output_config.effort"),
        "reasoning": only("use thinking and output_config.effort", {}),
        "parallel_tool_calls": only("use tool_choice.disable_parallel_tool_use", True),
        "instructions": unless("use system"),
        "input": unless("use messages"),
        "logprobs": unless("use /v1/chat/completions"),
        "top_logprobs": only("use /v1/chat/completions"),
        "prompt": unless("use messages"),
    }
)
# Of a message of a conversation.
MESSAGE_REFUSED = {
    "function_call": unless("use tool_calls"),
    "audio": unless(_NO_IMAGES),
    "images": unless(_NO_IMAGES),
}
# Of `thinking` of /v1/chat/completions.
THINKING_REFUSED = {
    "budget_tokens": only(_NO_BUDGET),
    "clear_thinking": only("use chat_template_kwargs, if the model's template knows it"),
}
# Of `output_config` of /v1/messages, and of its tools.
OUTPUT_REFUSED = {"task_budget": only(_NO_BUDGET)}
TOOL_REFUSED = {"allowed_callers": unless("only the model calls tools", ["direct"])}
TEMPLATE_REFUSED = {
    "add_generation_prompt": only("the prompt is always rendered ready for an answer", True),
    "continue_final_message": unless("use prefix in the last message"),
    "chat_template": unless(_OWN_TEMPLATE),
}
TOKENIZE_REFUSED = TEMPLATE_REFUSED | {
    "chat_template_kwargs": unless("the model's defaults are used", {}),
    "parse_special": only("special tokens in a prompt are always parsed", True),
}
