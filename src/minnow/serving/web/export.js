// A conversation as a file.

// role, content and what else the API knows of a message.
export function apiMessage({ role, content, reasoning_content, tool_calls, tool_call_id }) {
  return { role, content, reasoning_content, tool_calls, tool_call_id }; // JSON leaves out what is undefined
}

// The messages as training data and the API take them.
export function asJson(messages) {
  return JSON.stringify({ messages: messages.map(apiMessage) }, null, 2) + "\n";
}

export function asMarkdown(messages) {
  const parts = messages.map((message) => {
    const lines = [`## ${message.role}`];
    if (message.reasoning_content) lines.push(message.reasoning_content.replace(/^/gm, "> "));
    if (message.content) lines.push(message.content);
    for (const call of message.tool_calls ?? []) lines.push(`- ${call.function.name}: \`${call.function.arguments}\``);
    return lines.join("\n\n");
  });
  return parts.join("\n\n") + "\n";
}

export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
