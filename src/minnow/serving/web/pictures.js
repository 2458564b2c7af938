// Pictures that the user shows: files made small enough to send, and their places in a message.
import { element } from "./markdown.js";

const LONGEST_EDGE = 768; // pixels; more than models look at
const MOST_BYTES = 128 * 1024; // of a file that is sent as it is
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // what the server takes

// The picture in a file as a data: URL. Rejects for what is no picture.
export async function dataUrl(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_EDGE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MOST_BYTES && KINDS.includes(file.type)) return fileUrl(file);
  const [width, height] = [bitmap.width, bitmap.height].map((edge) => Math.max(1, Math.round(edge * scale)));
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function fileUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}

// A user's content: the text alone, or parts as OpenAI writes them, the pictures first.
export function contentOf(text, pictures) {
  if (!pictures.length) return text;
  const shown = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...shown, { type: "text", text }] : shown;
}

export function textOf(content) {
  return typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");
}

export function picturesOf(content) {
  return typeof content === "string" ? [] : content.flatMap((part) => part.image_url?.url ?? []);
}

export function pictureView(url, t) {
  return element("img", { src: url, alt: t.picture });
}
