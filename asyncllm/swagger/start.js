// relative, so that it works behind a proxy that adds a prefix
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true });
