(() => {
  const filters = document.querySelector("[data-filters]");
  if (!filters) return;
  filters.hidden = false;
  const wanted = { emotion: "", decoding: "" };
  const apply = () => {
    for (const card of document.querySelectorAll("#before-after .pair")) {
      card.hidden = Object.entries(wanted).some(([key, value]) => value && card.dataset[key] !== value);
    }
    for (const set of document.querySelectorAll("[data-set]")) {
      set.hidden = !set.querySelector(".pair:not([hidden])");
      for (const more of set.querySelectorAll(".more")) {
        const left = more.querySelectorAll(".pair:not([hidden])").length;
        more.hidden = !left;
        more.querySelector("summary").textContent = `${left} more`;
      }
    }
    for (const button of filters.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(wanted[button.dataset.key] === button.dataset.value));
    }
  };
  filters.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    wanted[button.dataset.key] = button.dataset.value;
    apply();
  });
})();
