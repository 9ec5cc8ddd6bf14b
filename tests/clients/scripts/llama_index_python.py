"""LlamaIndex: pip install llama-index-llms-openai-like"""

import asyncio
from importlib.metadata import version

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import Memory
from llama_index.llms.openai_like import OpenAILike
from toolbox import FIRST, KEY, SECOND, URL, read_file, second_turn

names = ("llama-index-core", "llama-index-llms-openai-like")
print(*(f"{name} {version(name)}" for name in names))
model = OpenAILike(
    model="scripted",
    api_base=f"{URL}/v1",
    api_key=KEY,
    is_chat_model=True,
    is_function_calling_model=True,
)
agent = FunctionAgent(tools=[read_file], llm=model)


async def talk() -> None:
    memory = Memory.from_defaults(session_id="notes")
    print(await agent.run(FIRST, memory=memory))
    second_turn()
    print(await agent.run(SECOND, memory=memory))


asyncio.run(talk())
