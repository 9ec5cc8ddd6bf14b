// openai for Node: npm install openai
import fs from 'fs';
import OpenAI from 'openai';
import { VERSION } from 'openai/version';
const { URL: url, KEY, FIRST, SECOND } = process.env;
console.log('openai', VERSION);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY });
const parameters = { type: 'object', properties: { path: { type: 'string' } }, required: ['path'] };
const tools = [{ type: 'function', function: { name: 'read_file', description: 'Reads a file', parameters } }];
const messages = [{ role: 'user', content: FIRST }];
for (const question of [SECOND, null]) {
  for (;;) {
    const stream = client.chat.completions.stream({ model: 'gpt-5', messages, tools });
    const { message } = (await stream.finalChatCompletion()).choices[0];
    messages.push(message);
    if (!message.tool_calls?.length) break;
    for (const call of message.tool_calls) {
      const { path } = JSON.parse(call.function.arguments);
      messages.push({ role: 'tool', tool_call_id: call.id, content: fs.readFileSync(path, 'utf8') });
    }
  }
  console.log(messages.at(-1).content);
  if (question) { messages.push({ role: 'user', content: question }); console.log('--- second turn'); }
}
