// Classifies the picked image; index.html says where the two files come from.
const CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
const [file, image, answer] = ["file", "image", "answer"].map((id) => document.getElementById(id));

/** The image's pixels as the model takes them: uint8 (1, h, w, 3). */
function pixels(ort) {
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const canvas = new OffscreenCanvas(width, height).getContext("2d");
  canvas.drawImage(image, 0, 0);
  const rgba = canvas.getImageData(0, 0, width, height).data;
  const rgb = rgba.filter((_, i) => i % 4 !== 3);
  return new ort.Tensor("uint8", new Uint8Array(rgb), [1, height, width, 3]);
}

async function start() {
  const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1; // several need a server that isolates the page from other origins
  const session = await ort.InferenceSession.create("model.onnx");
  file.addEventListener("change", async () => {
    try {
      image.src = URL.createObjectURL(file.files[0]);
      await image.decode();
      image.hidden = false;
      const { probabilities } = await session.run({ images: pixels(ort) });
      const order = CLASSES.map((_, i) => i).sort((a, b) => probabilities.data[b] - probabilities.data[a]);
      const shown = order.slice(0, 3).map((i) => `${CLASSES[i]} ${(100 * probabilities.data[i]).toFixed(1)}%`);
      answer.textContent = shown.join(", ");
    } catch (error) {
      answer.textContent = `This file can't be classified: ${error.message}`;
    }
  });
  file.disabled = false;
  answer.textContent = "Pick an image.";
}

start().catch((error) => {
  answer.textContent = `A file is missing, see below: ${error.message}`;
  document.querySelector("details").open = true;
});
