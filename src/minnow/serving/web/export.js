// A conversation as the API takes it, and as a file.
import { picturesOf, textOf } from "./pictures.js";

// The row that the API and `minnow sft` read: messages, the system prompt first, and the tools where there are any.
// An answer that an error or a stop left without content and calls is none: neither shown to a model nor learnt from.
export function conversation(messages, system, tools) {
  const said = messages.filter(({ role, content, tool_calls }) =>
    role !== "assistant" || content.trim() || tool_calls?.length);
  const row = { messages: said.map(apiMessage) };
  if (system) row.messages.unshift({ role: "system", content: system });
  if (tools.length) row.tools = tools;
  return row;
}

// role, content and what else the API knows of a message.
function apiMessage({ role, content, reasoning_content, tool_calls, tool_call_id }) {
  return { role, content, reasoning_content, tool_calls, tool_call_id }; // JSON leaves out what is undefined
}

export function asJson(row) {
  return JSON.stringify(row, null, 2) + "\n";
}

export function asMarkdown({ messages, tools = [] }) {
  const parts = messages.map((message) => {
    const lines = [`## ${message.role}`];
    if (message.reasoning_content) lines.push(message.reasoning_content.replace(/^/gm, "> "));
    for (const url of picturesOf(message.content)) lines.push(`![](${url})`);
    if (textOf(message.content)) lines.push(textOf(message.content));
    for (const call of message.tool_calls ?? []) lines.push(`- ${call.function.name}: \`${call.function.arguments}\``);
    return lines.join("\n\n");
  });
  const offered = tools.map((tool) => `- ${tool.function.name}: ${tool.function.description}`);
  if (offered.length) parts.push(["## tools", ...offered].join("\n\n"));
  return parts.join("\n\n") + "\n";
}

export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
