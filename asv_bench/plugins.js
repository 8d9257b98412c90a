/*
 * What asv's pages ask of three libraries that no package of pip's has. Each does what the pages use of it, and no more.
 */

/* Bars of several series beside each other, by `bars: {order: 1}`, where they would cover each other. */
(function ($) {
    function ordered(plot) {
        return plot.getData().filter(function (series) {
            return series.bars.show && series.bars.order;
        });
    }

    function place(plot, series, datapoints) {
        var all = ordered(plot);
        var index = all.indexOf(series);
        if (index < 0) {
            return;
        }
        var shift = (index - (all.length - 1) / 2) * series.bars.barWidth;
        for (var i = 0; i < datapoints.points.length; i += datapoints.pointsize) {
            if (datapoints.points[i] !== null) {
                datapoints.points[i] += shift;
            }
        }
    }

    $.plot.plugins.push({
        init: function (plot) {
            plot.hooks.processDatapoints.push(place);
        },
        name: "bars beside each other",
        version: "1"
    });
})(jQuery);

/*
 * Tables that sort by a click on a head with `data-sort`, the name of a comparison: one of those given, "string" or
 * "float". A cell's `data-sort-value` goes before its text. After sorting, the table gets an "aftertablesort" event.
 */
(function ($) {
    var comparisons = {
        "float": function (a, b) { return parseFloat(a) - parseFloat(b); },
        "string": function (a, b) { return String(a).localeCompare(String(b)); }
    };

    function value(row, column) {
        var cell = $(row).children().eq(column);
        var given = cell.attr("data-sort-value");
        return given === undefined ? cell.text() : given;
    }

    $.fn.stupidtable = function (more) {
        return this.each(function () {
            var table = $(this);
            table.data("comparisons", $.extend({}, comparisons, more));
            table.on("click", "thead th[data-sort]", function () {
                $(this).stupidsort($(this).data("direction") === "asc" ? "desc" : "asc");
            });
        });
    };

    $.fn.stupidsort = function (direction) {
        var head = this.first();
        var table = head.closest("table");
        var compare = (table.data("comparisons") || comparisons)[head.attr("data-sort")];
        if (compare) {
            var column = head.index();
            var sign = direction === "desc" ? -1 : 1;
            var body = table.children("tbody");
            var rows = body.children("tr").get();
            rows.sort(function (a, b) { return sign * compare(value(a, column), value(b, column)); });
            body.append(rows);
            head.data("direction", direction);
            table.trigger("aftertablesort", {column: column, direction: direction});
        }
        return this;
    };
})(jQuery);

/* The key under which the pages remember a regression that is to be ignored: any text that tells two of them apart. */
function md5(text) {
    return text;
}
