// What the next message shows: pictures that were picked, dropped onto the page or pasted, until it is sent.
import { element } from "./markdown.js";
import { dataUrl, pictureView } from "./pictures.js";

const $ = (id) => document.getElementById(id);

// page: sees() says whether the chosen model looks at pictures, t() gives the texts, tell(error) shows one.
export function pictureTray(page) {
  let urls = [];

  function draw() {
    $("picture").hidden = !page.sees();
    $("pictures").hidden = !urls.length;
    $("pictures").replaceChildren(...urls.map((url, place) => {
      const t = page.t();
      const remove = element("button", { type: "button", className: "remove", textContent: "×", ariaLabel: t.remove });
      remove.addEventListener("click", () => {
        urls.splice(place, 1);
        draw();
        $("input").focus();
      });
      return element("span", {}, pictureView(url, t), remove);
    }));
  }

  async function take(files) {
    if (!page.sees()) return;
    for (const file of files) {
      try {
        urls.push(await dataUrl(file));
      } catch {
        page.tell(file.name + page.t().no_picture);
      }
    }
    draw();
  }

  // The pictures, which are in the tray no longer.
  function empty() {
    const shown = urls;
    urls = [];
    draw();
    return shown;
  }

  $("picture").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    await take([...$("file").files]);
    $("file").value = ""; // or the same file could not be chosen again
    $("input").focus();
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  // A browser would leave the page for a file that is dropped onto it.
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
  $("input").addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    if (!files.length || types.includes("text/plain")) return; // text from a word processor comes with its picture
    event.preventDefault();
    take([...files]);
  });
  return { draw, empty, holds: () => urls.length > 0 };
}
