// Saves every answer when it is given; without scripts the form's own button does.
const form = document.getElementById("form");
const saved = document.getElementById("saved");
const talk = document.querySelector(".talk");
const unsaved = new Map(); // answers that the server has not confirmed
let going = Promise.resolve();

function save(input) {
  unsaved.set(input.name, input.value);
  saved.textContent = "Saving";
  going = going.then(send);
}

async function send() {
  if (!unsaved.size) return;
  const sent = new Map(unsaved);
  const body = new URLSearchParams([...sent]);
  let done = false;
  try {
    done = (await fetch(form.action, { method: "POST", body, headers: { "X-Autosave": "1" }, keepalive: true })).ok;
  } catch {} // the server is not there: tried again
  for (const [name, value] of done ? sent : []) if (unsaved.get(name) === value) unsaved.delete(name);
  if (!done) setTimeout(() => (going = going.then(send)), 2000);
  saved.textContent = !done ? "Not saved" : unsaved.size ? "Saving" : "Saved";
}

talk.scrollTop = talk.scrollHeight; // the reply to rate comes last

form.addEventListener("change", (event) => save(event.target));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const questions = [...form.querySelectorAll("fieldset")];
  const current = document.activeElement.closest?.("fieldset") ?? questions.find((q) => !q.querySelector(":checked")) ?? questions[0];
  if ("12345".includes(event.key)) {
    const input = current.querySelector(`input[value="${event.key}"]`);
    input.checked = true;
    save(input);
    const next = questions[questions.indexOf(current) + 1];
    const target = next ? next.querySelector(":checked") ?? next.querySelector("input") : document.getElementById("next");
    target.focus();
    event.preventDefault();
  } else if (event.key === "Enter" && document.activeElement.type === "radio") {
    form.requestSubmit();
    event.preventDefault();
  }
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  going.then(() => form.submit()); // all answers travel again with the form, so one that was not saved is now
});
