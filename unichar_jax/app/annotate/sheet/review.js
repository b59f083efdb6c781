"use strict";
const shown = JSON.parse(document.getElementById("data").textContent);
const fieldsets = [...document.querySelectorAll("fieldset")];

// What is in a form: the edited fields, or null if one is not JSON where it has to be.
function edits(fieldset) {
  const original = shown.values[fieldset.dataset.id], changed = {};
  for (const area of fieldset.querySelectorAll("textarea")) {
    let value = area.value;
    if (area.dataset.nested === "1") {
      try { value = JSON.parse(value); } catch { return null; }
    }
    if (JSON.stringify(value) !== JSON.stringify(original[area.dataset.key])) changed[area.dataset.key] = value;
  }
  return changed;
}

function decisions() {
  const made = { drop: [], edit: {} };
  let bad = 0;
  for (const fieldset of fieldsets) {
    const changed = edits(fieldset), keep = fieldset.querySelector("input").checked;
    fieldset.classList.toggle("dropped", !keep);
    fieldset.classList.toggle("bad", changed === null);
    fieldset.classList.toggle("edited", changed !== null && Object.keys(changed).length > 0);
    if (!keep) made.drop.push(fieldset.dataset.id);
    else if (changed === null) bad++;
    else if (Object.keys(changed).length) made.edit[fieldset.dataset.id] = changed;
  }
  const words = [`${made.drop.length} dropped`, `${Object.keys(made.edit).length} edited`];
  if (bad) words.push(`${bad} not valid JSON`);
  document.getElementById("state").textContent = words.join(", ");
  document.getElementById("save").disabled = bad > 0;
  return made;
}

for (const fieldset of fieldsets) {
  const id = fieldset.dataset.id;
  if (shown.drop.includes(id)) fieldset.querySelector("input").checked = false;
  for (const area of fieldset.querySelectorAll("textarea")) {
    const value = (shown.edit[id] || {})[area.dataset.key];
    if (value !== undefined) area.value = area.dataset.nested === "1" ? JSON.stringify(value) : value;
  }
}
document.addEventListener("input", decisions);
document.getElementById("save").onclick = () => {
  const text = JSON.stringify(decisions(), null, 2);
  const link = document.createElement("a");
  link.href = "data:application/json;charset=utf-8," + encodeURIComponent(text);
  link.download = "decisions.json";
  link.click();
};
decisions();
