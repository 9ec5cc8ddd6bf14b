"""OpenAI's Agents SDK: pip install openai-agents"""

import asyncio
from importlib.metadata import version

import openai
from agents import (
    Agent,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from toolbox import FIRST, KEY, SECOND, URL, read_file, second_turn

print("openai-agents", version("openai-agents"))
set_tracing_disabled(True)
set_default_openai_client(openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY))
agent = Agent(name="Reader", model="scripted", tools=[function_tool(read_file)])


async def talk() -> None:
    first = await Runner.run(agent, FIRST)
    print(first.final_output)
    second_turn()
    again = [*first.to_input_list(), {"role": "user", "content": SECOND}]
    print((await Runner.run(agent, again)).final_output)


asyncio.run(talk())
