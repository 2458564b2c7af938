// A message as DOM nodes, brought up to date as it grows.
import { element, renderMarkdown } from "./markdown.js";
import { pictureView, picturesOf, textOf } from "./pictures.js";

// actions: edit(message, text), regenerate(). Returns {node, update}; update draws what changed.
export function messageView(message, t, actions) {
  const speaker = { user: t.user, assistant: t.model, tool: t.result }[message.role];
  const node = element("article", { className: message.role, ariaLabel: speaker });
  if (message.role === "tool") {
    node.append(element("pre", { textContent: message.content }));
    return { node, update() {} };
  }
  if (message.role === "user") {
    const shown = picturesOf(message.content).map((url) => pictureView(url, t));
    const body = element("div", { className: "text", textContent: textOf(message.content) });
    body.hidden = !body.textContent;
    const edit = element("button", { type: "button", className: "edit quiet", textContent: t.edit });
    edit.addEventListener("click", () => editMessage(node, message, t, actions));
    node.append(element("div", { className: "pictures" }, ...shown), body, element("footer", {}, edit));
    return { node, update() {} };
  }
  return assistantView(node, message, t, actions);
}

function assistantView(node, message, t, actions) {
  const summary = element("summary");
  const thoughts = element("div", { className: "thoughts" });
  const folded = element("details", {}, summary, thoughts);
  const body = element("div", { className: "text" });
  const calls = element("div");
  const stats = element("span", { className: "stats" });
  const regenerate = element("button", { type: "button", className: "regenerate quiet", textContent: t.regenerate });
  regenerate.addEventListener("click", () => actions.regenerate());
  node.append(folded, body, calls, element("footer", {}, regenerate, stats));

  function update() {
    folded.hidden = !message.reasoning_content;
    summary.textContent = message.content || message.finish ? t.thoughts : t.thinking;
    thoughts.textContent = message.reasoning_content ?? "";
    body.replaceChildren(renderMarkdown(message.content, t));
    calls.replaceChildren(...(message.tool_calls ?? []).map((call) =>
      element("pre", { className: "call", textContent: `${t.call} ${call.function.name} ${call.function.arguments}` })));
    stats.replaceChildren(...describe(message, t));
    node.classList.toggle("waiting", !message.finish && !message.content);
  }
  update();
  return { node, update };
}

function describe(message, t) {
  const parts = [];
  if (message.tokens) parts.push(`${message.tokens} ${t.tokens}`);
  if (message.rate) parts.push(`${message.rate.toFixed(message.rate < 10 ? 1 : 0)} ${t.rate}`);
  if (["length", "stopped", "rounds"].includes(message.finish)) parts.push(t[message.finish]);
  const nodes = [parts.join(" · ")];
  if (message.error) nodes.push(element("span", { className: "error", textContent: t.error + message.error }));
  return nodes;
}

function editMessage(node, message, t, actions) {
  const before = [...node.childNodes];
  const area = element("textarea", { value: textOf(message.content), rows: 3, ariaLabel: t.edit });
  const save = element("button", { type: "button", className: "save main", textContent: t.save });
  const cancel = element("button", { type: "button", textContent: t.cancel });
  const says = () => area.value.trim() || picturesOf(message.content).length;
  save.addEventListener("click", () => says() && actions.edit(message, area.value));
  const close = () => {
    node.replaceChildren(...before);
    node.querySelector(".edit").focus();
  };
  cancel.addEventListener("click", close);
  area.addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && close());
  node.replaceChildren(area, element("footer", {}, save, cancel));
  area.focus();
}
