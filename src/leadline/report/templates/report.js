// A study's report: its plots are dot plots.
plots.push(...[...document.querySelectorAll(".plot")].map(dotPlot));
