// An image may be dropped anywhere, or pasted: both end in the one file field that the upload button has.
() => {
  const maxBytes = MAX_BYTES;
  const field = () => document.querySelector("input[type=file]");
  // On telephones this opens the photographs, and has them converted.
  const accepted = "image/jpeg,image/png,image/gif,image/webp,image/bmp";
  const give = (files) => {
    const input = field();
    if (!input || !files.length) return;
    const chosen = new DataTransfer();
    chosen.items.add(files[0]);
    input.files = chosen.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const hasFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    give(files);
  });
  let depth = 0;
  const mark = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", (event) => hasFiles(event) && mark(1));
  document.addEventListener("dragleave", (event) => hasFiles(event) && mark(-1));
  // Without this the browser leaves the page and shows the file.
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(-depth);
    give([...event.dataTransfer.files]);
  });
  const open = (event) => {
    if (!event.target.closest?.("#image .panel")) return;
    event.preventDefault();
    field()?.click();
  };
  document.addEventListener("click", (event) => event.target === field() && (field().accept = accepted), true);
  document.addEventListener("click", open);
  document.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && open(event));
  // The server would refuse it only after all of it was sent.
  document.addEventListener(
    "change",
    (event) => {
      if (event.target !== field()) return;
      const isTooBig = [...event.target.files].some((file) => file.size > maxBytes);
      document.querySelector("#too_big").hidden = !isTooBig;
      if (!isTooBig) return;
      event.stopImmediatePropagation();
      event.target.value = "";
    },
    true,
  );
};
