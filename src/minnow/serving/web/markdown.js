// Markdown as DOM nodes. Text only ever becomes text nodes, so nothing a model writes can become markup.

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([^`]*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

// A piece of Markdown -> a fragment. t: the texts, for the button of a code block.
export function renderMarkdown(text, t) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const fence = FENCE.exec(lines[i]);
    if (fence) {
      const code = [];
      for (i += 1; i < lines.length && !closes(lines[i], fence[1]); i += 1) code.push(lines[i]);
      i += 1; // the closing fence, or past the end of an answer that is still being written
      out.append(codeBlock(code.join("\n"), fence[2].trim(), t));
      continue;
    }
    const heading = HEADING.exec(lines[i]);
    if (heading) {
      out.append(element(`h${heading[1].length}`, {}, ...inline(heading[2])));
      i += 1;
      continue;
    }
    const item = ITEM.exec(lines[i]);
    if (item) {
      const ordered = item[1] !== undefined;
      const list = element(ordered ? "ol" : "ul", ordered ? { start: Number(item[1]) } : {});
      for (let next; i < lines.length && (next = ITEM.exec(lines[i])) && (next[1] !== undefined) === ordered; i += 1) {
        list.append(element("li", {}, ...inline(next[2])));
      }
      out.append(list);
      continue;
    }
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const paragraph = [];
    while (i < lines.length && lines[i].trim() && ![FENCE, HEADING, ITEM].some((kind) => kind.test(lines[i]))) {
      paragraph.push(lines[i]);
      i += 1;
    }
    out.append(element("p", {}, ...inline(paragraph.join("\n"))));
  }
  return out;
}

function closes(line, fence) {
  const bare = line.trim();
  return bare.length >= fence.length && bare === fence[0].repeat(bare.length);
}

function codeBlock(code, language, t) {
  const button = element("button", { type: "button", className: "copy", textContent: t.copy });
  const block = element("code", { textContent: code });
  button.addEventListener("click", async () => {
    if (await copy(code, block)) button.textContent = t.copied;
  });
  return element("div", { className: "code" },
    element("div", { className: "bar" }, element("span", { textContent: language }), button),
    element("pre", {}, block));
}

// Browsers have a clipboard only over https and on the machine itself; elsewhere what `node` shows is selected and copied.
async function copy(text, node) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  getSelection().selectAllChildren(node);
  return document.execCommand("copy");
}

// `code`, **bold**, *italic*, [text](address): the earliest one first. Their length has a bound, and many stars in a row
// are text: the end is looked for from each place where one might begin, and a small model may write stars for ever.
const INLINE = /(`+)([^`]|[^`][^]{0,500}?[^`])\1(?!`)|\*{4,}|\*\*(?=\S)([^]{0,500}?\S)\*\*(?!\*)|\*(?=[^\s*])([^*]*[^\s*])\*|\[([^\]\n]*)\]\(([^\s()]*)\)/;

function inline(text) {
  const nodes = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    if (!found) {
      nodes.push(rest);
      break;
    }
    if (found.index) nodes.push(rest.slice(0, found.index));
    const [whole, , code, bold, italic, label, address] = found;
    if (code !== undefined) nodes.push(element("code", { textContent: code }));
    else if (bold !== undefined) nodes.push(element("strong", {}, ...inline(bold)));
    else if (italic !== undefined) nodes.push(element("em", {}, ...inline(italic)));
    else nodes.push((label !== undefined && link(label, address)) || whole);
    rest = rest.slice(found.index + whole.length);
  }
  return nodes;
}

// Only addresses of the web become links; javascript:, data: and the like stay the text they are.
function link(label, address) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer", textContent: label || address });
}
