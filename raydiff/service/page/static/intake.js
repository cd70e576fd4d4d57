/** Where images come from: dropped, pasted, chosen, or taken with the camera. */

import { byId } from "./dom.js";

/** Call `take(files)` for every way in, `complain(title, detail)` where one does not work. */
export function watchIntake(take, complain) {
  watchChoice(byId("files"), take);
  watchChoice(byId("snapshot"), take);
  watchDrop(take, complain);
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    take(files);
  });
  watchCamera(take, complain);
}

function watchChoice(input, take) {
  input.addEventListener("change", () => {
    if (input.files.length) take([...input.files]);
    input.value = ""; // the same file can be chosen again
  });
}

/** The whole window takes a drop, so that a near miss does not leave the page. */
function watchDrop(take, complain) {
  const area = byId("drop");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  for (const name of ["dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if (name === "drop" || event.relatedTarget === null) area.classList.remove("over");
    });
  }
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const files = [...(event.dataTransfer?.files ?? [])];
    if (files.length) take(files);
    else complain("That was no file", "Drop image files; pictures from another page must be saved first.");
  });
}

function watchCamera(take, complain) {
  const dialog = byId("camera");
  const video = byId("video");
  const stop = () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  };
  byId("camera-open").addEventListener("click", async () => {
    if (!navigator.mediaDevices?.getUserMedia) {
      byId("snapshot").click(); // browsers give the camera to https and localhost only; phones have an app for it
      return;
    }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      complain("There is no camera to use", cameraReason(error));
      return;
    }
    dialog.showModal();
  });
  byId("camera-take").addEventListener("click", async () => {
    const file = await frame(video);
    dialog.close();
    if (file === null) complain("The camera gave no picture", "Wait until the picture moves, then take it.");
    else take([file]);
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
}

function cameraReason(error) {
  if (error.name === "NotAllowedError") return "It may not be used; allow the camera for this page, then try again.";
  if (error.name === "NotFoundError") return "No camera was found; connect one and try again, or choose a file.";
  return "Another program may be using it; close that one and try again, or choose a file.";
}

/** What the video shows now, as PNG: compressing it with losses would change the score. */
async function frame(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  if (!canvas.width) return null;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const name = `camera ${new Date().toLocaleTimeString("en-GB")}.png`;
  return blob === null ? null : new File([blob], name, { type: "image/png" });
}
